"""Re-watch: recorded history judged again under a change, compared with what was said, and shown."""
