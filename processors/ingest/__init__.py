"""Ingest: images of cameras, by folder or by HTTP upload, become records on `frames`, each exactly once."""
