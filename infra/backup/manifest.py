"""What a backup says of itself: written last, replaced whole, so a backup is complete or is not there."""

import hashlib
from typing import Any

import msgspec

from infra.backup.packs import Pack
from infra.backup.passes import Pass
from infra.backup.target import Target
from schemas.records import TopicMeta

NAME = "MANIFEST.json"
FORMAT = 1
"""Of the files; a newer one is refused."""


class ManifestError(Exception):
    """There is no backup that can be used; the message says what is missing and what to do."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One backup: which moment of which installation, and its files."""

    format: int = FORMAT
    made_at: int
    """When its moment was, ms since the Unix epoch."""
    version: str
    """Of the product that made it."""
    partitions: int
    """Of each data topic."""
    topics: tuple[TopicMeta, ...]
    """Their lives at that moment."""
    starts: dict[str, dict[int, int]]
    """The first offset that the broker still had, by topic and partition."""
    positions: dict[str, dict[str, dict[int, int]]]
    """The next offset to be done, by stage, topic and partition."""
    history: tuple[Pack, ...]
    """What ClickHouse had: records below the sink's positions. Later backups into the same place add to it."""
    tail: tuple[Pack, ...]
    """What the sink had not taken yet, and the state that stages keep on the log."""
    passes: tuple[Pass, ...]
    """What retention had taken, the first pass first; of that, packs of earlier backups may hold records."""
    images: int
    """How many images its records claim."""
    missing: tuple[str, ...]
    """Those that the image store did not have, by SHA-256."""
    notes: tuple[str, ...] = ()
    """What a person should know."""
    digest: str = ""
    """SHA-256 of all the rest."""

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 by name, of every file but images, which have it for a name."""
        packs = (*self.history, *self.tail)
        files = {pack.name: pack.sha256 for pack in packs} | {pack.claims: pack.claims_sha256 for pack in packs}
        return files | {one.file: one.sha256 for one in self.passes}

    @property
    def records(self) -> int:
        """How many records it holds."""
        return sum(pack.records for pack in (*self.history, *self.tail))


def write(target: Target, manifest: Manifest) -> Manifest:
    """Put it in place of the last one; what was written, with its digest."""
    whole = msgspec.structs.replace(manifest, digest=_digest(manifest))
    target.put(NAME, msgspec.json.format(msgspec.json.encode(whole), indent=1))
    return whole


def read(target: Target) -> Manifest:
    """The manifest of a backup.

    Raises:
        ManifestError: there is none, or it is damaged, or of a newer version.
    """
    try:
        data = target.read(NAME)
    except FileNotFoundError:
        begun = next(iter(target.names("history")), None)
        why = "a backup was begun here and not finished: run it again, it goes on" if begun else "no backup is here"
        raise ManifestError(f"{target.root} has no {NAME}: {why}") from None
    try:
        plain: Any = msgspec.json.decode(data)
        if isinstance(plain, dict) and isinstance(plain.get("format"), int) and plain["format"] > FORMAT:
            raise ManifestError(f"{target.root}: a newer version of this product made this backup; use that one")
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ManifestError(f"{target.root}/{NAME} is damaged ({error}): use a copy of the backup") from None
    if manifest.digest != _digest(manifest):
        raise ManifestError(f"{target.root}/{NAME} is damaged (its digest is another): use a copy of the backup")
    return manifest


def image_name(sha256: str) -> str:
    """The file of an image."""
    return f"images/{sha256[:2]}/{sha256[2:4]}/{sha256}"


def _digest(manifest: Manifest) -> str:
    bare = msgspec.structs.replace(manifest, digest="")
    return hashlib.sha256(msgspec.json.encode(bare)).hexdigest()
