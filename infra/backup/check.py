"""Checking a backup without any server: every file is there, whole, and what its manifest says."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from infra.backup import manifest as manifests
from infra.backup.manifest import Manifest
from infra.backup.packs import claims_of
from infra.backup.target import Target

SHOWN = 20
"""Problems that are named; beyond that they are counted."""


class Problem(NamedTuple):
    """A file that is not as it should be."""

    file: str
    what: str


class Checked(NamedTuple):
    """What was found."""

    manifest: Manifest
    files: int
    """Files that were read, images included."""
    images: int
    problems: list[Problem]
    """The first of them."""
    wrong: int
    """All of them."""


def check(target: Target, told: Callable[[str, int, int], None] = lambda *_: None) -> Checked:
    """Read every file of a backup and compare it.

    Raises:
        ManifestError: there is no manifest that could be compared with.
        UnavailableError: the place cannot be read.
    """
    manifest = manifests.read(target)
    found: list[Problem] = []
    count = 0

    def note(problem: Problem | None) -> bool:
        nonlocal count
        if problem is not None:
            count += 1
            if len(found) < SHOWN:
                found.append(problem)
        return problem is None

    files = manifest.files
    good = set()
    for done, (name, sha256) in enumerate(files.items(), 1):
        if note(_compared(target, name, sha256)):
            good.add(name)
        told("files", done, len(files))
    images = sorted(
        {
            claim
            for pack in (*manifest.history, *manifest.tail)
            if pack.claims in good
            for claim in claims_of(target, pack)
        }
        - {*manifest.missing}
    )
    for done, sha256 in enumerate(images, 1):
        note(_compared(target, manifests.image_name(sha256), sha256))
        told("images", done, len(images))
    for problem in _gaps(manifest):
        note(problem)
    return Checked(manifest, len(files) + len(images), len(images), found, count)


def _compared(target: Target, name: str, sha256: str) -> Problem | None:
    try:
        found, _ = target.sha256(name)
    except FileNotFoundError:
        return Problem(name, "is missing")
    return None if found == sha256 else Problem(name, "is damaged: its SHA-256 is another")


def _gaps(manifest: Manifest) -> Iterator[Problem]:
    """Parts of one partition follow one another and do not overlap."""
    reached: dict[tuple[str, str, int], int] = {}
    for pack in manifest.history:
        for part in pack.parts:
            if part.lo <= reached.get(part.life, -1):
                yield Problem(pack.name, f"holds {part.topic}-{part.partition} from {part.lo} a second time")
            reached[part.life] = part.hi
