"""The archive of an event: which files it holds, and its bytes. The same evidence makes the same bytes.

Pure: evidence in, bytes out. No clock is read, and nothing is compressed: a compressor's next version would make other
bytes, images do not shrink, and an archive that never unpacks cannot unpack to more than it is.
"""

import hashlib
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from infra.export import verify
from infra.export.evidence import Evidence, Kept
from infra.export.page import page
from infra.export.signing import Signed
from streams.messages import FINGERPRINT


def files_of(evidence: Evidence, *, version: str) -> dict[str, bytes]:
    """Every file of the archive by name, in its order, but the signature; `version` is the product's."""
    files: dict[str, bytes] = {
        "index.html": page(evidence, version=version).encode(),
        "verify.py": Path(verify.__file__).read_bytes(),
        "verdict.json": verify.dumped(verify.plain({name: evidence.event[name] for name in verify.VERDICT})),
        "prompt.json": evidence.event["rendered_prompt"].encode(),
    }
    for number, shot in enumerate(evidence.shots, 1):
        if shot.image is not None:
            files[image_name(number)] = shot.image
    schemas: dict[str, bytes] = {}
    for name, kept in evidence.records.items():
        schema = f"schemas/{kept.topic}.{kept.fingerprint}.avsc"
        schemas[schema] = verify.dumped(_without_marks(kept.schema))
        files[f"records/{name}.json"] = verify.dumped(_described(kept, schema))
        files[f"records/{name}.avro"] = kept.value
    files |= dict(sorted(schemas.items()))
    return files | {verify.MANIFEST: verify.dumped(_manifest(evidence, files, version))}


def image_name(number: int) -> str:
    """Where the image of a frame lies, counted from 1."""
    return f"images/{number:03}.jpg"


def packed(files: Mapping[str, bytes], sign: Callable[[bytes], Signed] | None = None) -> bytes:
    """The archive of these files, the manifest signed where there is something to sign it with.

    Raises:
        ValueError: they are more than a zip of this kind holds, 4 GiB.
    """
    all_ = dict(files)
    if sign is not None:
        all_[verify.SIGNATURE] = verify.signature_file(*sign(files[verify.MANIFEST]))
    out = bytearray()
    entries: list[tuple[str, int, int, int]] = []
    for name, body in all_.items():
        crc = zlib.crc32(body)
        entries.append((name, crc, len(body), len(out)))
        out += verify.local_header(name, crc, len(body))
        out += body
    return bytes(out + verify.directory(entries))


def _manifest(evidence: Evidence, files: Mapping[str, bytes], version: str) -> dict[str, Any]:
    event = evidence.event
    manifest = {
        "format": verify.FORMAT,
        "event_id": event["event_id"],
        "made_by": f"rewatch {version}",
        "chain": {
            "frames": [
                {
                    "frame_id": shot.frame_id,
                    "image": image_name(number) if shot.image is not None else None,
                    "sha256": shot.sha256,
                }
                for number, shot in enumerate(evidence.shots, 1)
            ],
            "batch_id": event["batch_id"],
            "event_id": event["event_id"],
            "prompt_digest": event["prompt_digest"],
            "verdict_digest": event["verdict_digest"],
        },
        "missing": [{"what": what, "why": why} for what, why in evidence.missing],
        "files": [
            {"name": name, "size": len(body), "sha256": hashlib.sha256(body).hexdigest()}
            for name, body in files.items()
        ],
    }
    return manifest | {"root": verify.root_of(manifest)}


def _described(kept: Kept, schema: str) -> dict[str, Any]:
    """A record as its JSON file has it: what it says, and how it stood on the log."""
    return {
        "topic": kept.topic,
        "origin": kept.origin,
        "key": _text(kept.key),
        "headers": [
            {"name": name, "value": value.hex() if name == FINGERPRINT else _text(value)}
            for name, value in kept.headers
        ],
        "schema": schema,
        "record": verify.plain(kept.record),
    }


def _text(data: bytes) -> Any:
    """Bytes as text where they are text, else as hex."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"hex": data.hex()}


def _without_marks(schema: Any) -> Any:
    """The schema without what the parser notes in it for itself, in one order: the parser's changes by process."""
    if isinstance(schema, dict):
        return {name: _without_marks(part) for name, part in sorted(schema.items()) if not name.startswith("__")}
    if isinstance(schema, list | tuple):
        return [_without_marks(part) for part in schema]
    return schema
