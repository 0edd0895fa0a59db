"""What lies in the inbox and is nobody's, for people who wonder why it is not taken."""

import fnmatch

from processors.ingest import core
from processors.ingest.settings import FolderSettings


def strays(settings: FolderSettings) -> list[str]:
    """Folders whose names are no camera ids, with a `/` behind, and files beside the folders: ingest leaves them.

    One look at the root alone, whatever lies in the folders. Empty where the root is not there or cannot be read.
    """
    found = []
    try:
        for path in sorted(settings.root.iterdir()):
            name = path.name
            if name.startswith("."):
                continue
            if path.is_dir():
                if name not in settings.cameras and not _is_camera_id(name):
                    found.append(f"{name}/")
            elif "." not in settings.cameras and not ignored(settings, name):
                found.append(name)
    except OSError:  # the check of the inbox tells it
        return []
    return found


def ignored(settings: FolderSettings, name: str) -> bool:
    """Whether a file is none of a camera's pictures, by its name."""
    return any(fnmatch.fnmatch(name.lower(), glob.lower()) for glob in settings.ignore)


def _is_camera_id(name: str) -> bool:
    try:
        core.check_camera_id(name)
    except core.RejectedError:
        return False
    return True
