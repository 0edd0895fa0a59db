"""Certificates of an installation's own: its authority, what it signs, and the folder where both are kept."""
