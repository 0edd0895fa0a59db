"""The demo's small world: rendered footage, the detector and the analyst trained on it, their weights."""
