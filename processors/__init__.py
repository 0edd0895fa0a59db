"""One folder a stage; each is a pure `core` and a thin `stage`, and meets the others on topics only."""
