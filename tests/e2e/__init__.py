"""Everything together, as a person starts it, and killed."""
