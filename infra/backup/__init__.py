"""Backup and restore: everything that an installation knows, in a directory, and an installation made of it again.

A restored installation is the same one: its topics have the lives (epochs) and its records the offsets that they had,
so whatever names a record (lineage, windows, dead letters, positions, ClickHouse's rows) is right without being
touched. `cut` says which moment a backup shows, `refill` how a new broker comes to old offsets.
"""
