"""Tests of the log: delivery, codec, topics, hosts."""
