"""sink: keeps every record in ClickHouse, as it came and as typed rows; also how the rest of the product reads them."""
