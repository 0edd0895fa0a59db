"""The gateway: a page to look at, a JSON API, and the door for uploads, in front of the log and ClickHouse."""
