"""enrich: batches become contexts; a pass-through until enrichers exist."""
