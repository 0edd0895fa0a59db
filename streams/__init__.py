"""The log: topics, codec, delivery, stage hosts. Knows no model and no SQL."""
