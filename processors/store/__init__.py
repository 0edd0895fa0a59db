"""ClickHouse as every part of the product meets it: settings, connection, and what is asked of it. No stage."""
