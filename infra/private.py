"""The data directory is its owner's alone: pictures of people, the log, certificates' keys and ClickHouse lie in it."""

from pathlib import Path


def make_private(data_dir: Path) -> None:
    """Make the directory where it is missing, for nobody else to look into.

    One that is there stays as somebody made it: `rewatch doctor` tells where others can look in.
    """
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)


def others_look_in(path: Path) -> bool:
    """Whether every user of the machine can read what lies at the path, or list it."""
    return bool(path.stat().st_mode & 0o005)
