"""The contracts: Avro schemas and the records they describe, ClickHouse migrations, prompts, ids."""
