"""One suite that every host must pass, on the real broker: kills, zombies, lost brokers, hanging work."""
