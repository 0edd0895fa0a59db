"""The campaign: faults at random, seeded instants under steady load on a whole installation, then an audit.

`python -m tests.chaos --n 100 --seed 7`. README.md beside this says how to read what it writes.
"""
