"""Stands in for ClickHouse's server in a container: the embedded engine on the network. It knows no users."""

from infra.local import clickhouse

if __name__ == "__main__":
    clickhouse.HOST = "0.0.0.0"
    clickhouse.main()
