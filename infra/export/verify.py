"""Checks an exported event, offline: `python3 verify.py [ARCHIVE.zip or FOLDER] [--key PUBLIC.pem]`.

This file lies in every archive that `rewatch export` writes, and is what `rewatch export verify` runs: so it is one
file, which needs Python 3.9 or newer and nothing else, no network and no package. Whoever does not trust an archive
does not trust the copy in it either, and takes this file from elsewhere.

What it checks, each failure by name:
1. The archive is, byte for byte, the one that its contents make: entries are stored, never compressed, in one order and
   with fixed times. So nothing hides between them, and nothing unpacks to more than what lies on the disk.
2. Every file has the SHA-256 that MANIFEST.json says, and MANIFEST.json the root that it names itself.
3. Every record of the log decodes by its Avro schema to the JSON beside it.
4. The chain: image -> its SHA-256 -> frame_id -> batch_id -> event_id; prompt, parameters and model -> verdict_digest.
   Each image and record that the chain names is there, or MANIFEST.json says that it is missing, and so does this.
5. The signature (Ed25519), where there is one. By whom, only a key that you know from elsewhere can tell (`--key`).

What it cannot check: an export that is not signed may have been made by anybody, parts taken out and named as missing
too, unless its root is one that you were told; and the page index.html is not compared with the records.

Exit code 0: whole. 1: something is not as it was exported. 2: it cannot be read.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import stat
import struct
import sys
import zlib
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

FORMAT = "rewatch-export/1"
MANIFEST = "MANIFEST.json"
SIGNATURE = "MANIFEST.sig"

# Letters that every file system and every program takes; no part begins with a dot, so none leads elsewhere.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,100}){0,2}", re.ASCII)
# An event has some hundred files. More are a folder that somebody pointed at by mistake.
_MOST_FILES = 100_000
# Of Avro's arrays and maps: items may take no bytes at all, so the bytes do not bound them.
_MOST_ITEMS = 1_000_000
_DIGEST_HEX = 32

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_STORED, _VERSION, _UNIX = 0, 20, 3
_DATE = (1 << 5) | 1  # 1980-01-01, the first day that a zip knows
_ATTRIBUTES = (stat.S_IFREG | 0o644) << 16
_MOST_ZIP = 0xFFFFFFFF


class Problem(NamedTuple):
    """One thing that is not as it was exported."""

    where: str
    """The file, or `archive`."""
    what: str

    def __str__(self) -> str:
        return _shown(f"{self.where}: {self.what}")


class Verified(NamedTuple):
    """What a check found."""

    event_id: str
    root: str
    """SHA-256 of the manifest without this line: the one short name of everything in the archive."""
    problems: tuple[Problem, ...]
    links: tuple[str, ...]
    """The links of the chain that were computed again and are right."""
    missing: tuple[str, ...]
    """What the export itself says it lacks, and why."""
    signed_by: str
    """SHA-256 of the public key that signed it; empty: it is not signed."""
    known: bool
    """Whether that is the key that was given."""

    @property
    def whole(self) -> bool:
        """Whether the parts fit together and to the signature, where there is one."""
        return not self.problems


class UnreadableError(Exception):
    """It is no export, or cannot be read; the message says why."""


def main(arguments: Sequence[str]) -> int:
    """Check what the command line names, and say what was found."""
    paths = list(arguments)
    key: bytes | None = None
    try:
        if "--key" in paths:
            at = paths.index("--key")
            key = public_key(Path(paths[at + 1]).read_bytes())
            del paths[at : at + 2]
        if len(paths) > 1 or any(path.startswith("-") for path in paths):
            raise IndexError
        found = verify(Path(paths[0]) if paths else Path(__file__).parent, key)
    except IndexError:
        print("usage: verify.py [ARCHIVE.zip or FOLDER] [--key PUBLIC.pem]", file=sys.stderr)
        return 2
    except (UnreadableError, OSError, ValueError) as error:
        print(f"error: {_shown(str(error))}", file=sys.stderr)
        return 2
    for line in told(found):
        print(line)
    return 0 if found.whole else 1


def told(found: Verified) -> Iterator[str]:
    """What was found, line by line, for people."""
    yield _shown(f"event {found.event_id}")
    yield f"root  {found.root}"
    for link in found.links:
        yield _shown(f"  ok  {link}")
    for lack in found.missing:
        yield _shown(f"  --  not in this export: {lack}")
    for problem in found.problems:
        yield f"  !!  {problem}"
    if found.signed_by:
        whose = "the key that you gave" if found.known else "compare it with one that you know, or give --key"
        yield f"signed by the key with SHA-256 {found.signed_by} ({whose})"
    else:
        yield "not signed: compare the root with one that you were told"
    if not found.whole:
        yield f"NOT as it was exported: {len(found.problems)} named above"
    elif found.known:
        yield "whole: everything is as it was exported"
    elif found.signed_by:
        yield "whole: everything is as it was signed by that key"
    else:
        yield (
            "the parts fit together; who exported it is not shown (a signature shows that), and the page index.html is "
            "not checked against the records"
        )


def verify(path: Path, key: bytes | None = None) -> Verified:
    """Check an archive or a folder; `key` is the public key, 32 bytes, that has to have signed it.

    Raises:
        UnreadableError: it is no export.
        OSError: it cannot be read.
    """
    files, problems = _folder(path) if path.is_dir() else _archive(path)
    if MANIFEST not in files:
        if problems:
            return Verified("unknown", "unknown", tuple(problems), (), (), "", known=False)
        raise UnreadableError(f"{path} is no export of rewatch: it holds no {MANIFEST}")
    manifest, wrong = _manifest(files[MANIFEST])
    problems += wrong
    # A manifest that was changed is named once: neither its signature nor the files can fit it.
    signed_by = ""
    if MANIFEST not in {problem.where for problem in problems}:
        signed_by, wrong = _signature(files, key)
        problems += wrong
        problems += _against(manifest, files, {problem.where for problem in problems})
    links: list[str] = []
    # What is not as the manifest says is named already, and what it says proves nothing.
    if not problems:
        links, problems = _contents(manifest, files)
    return Verified(
        str(manifest.get("event_id", "unknown")),
        str(manifest.get("root", "unknown")),
        tuple(dict.fromkeys(problems)),
        tuple(links),
        () if problems else tuple(f"{lack['what']}: {lack['why']}" for lack in manifest["missing"]),
        signed_by,
        key is not None and signed_by == hashlib.sha256(key).hexdigest(),
    )


# ---- the archive ----


def local_header(name: str, crc: int, size: int) -> bytes:
    """What stands before a file's bytes in the archive."""
    letters = name.encode("ascii")
    return _LOCAL.pack(b"PK\3\4", _VERSION, 0, _STORED, 0, _DATE, crc, size, size, len(letters), 0) + letters


def directory(entries: Iterable[tuple[str, int, int, int]]) -> bytes:
    """The archive's table of contents; entries are name, CRC-32, size and offset.

    Raises:
        ValueError: together they are more than a zip of this kind holds, 4 GiB or 65,535 files.
    """
    table = bytearray()
    count = end = 0
    for name, crc, size, offset in entries:
        letters = name.encode("ascii")
        made_by = _UNIX << 8 | _VERSION
        end = offset + _LOCAL.size + len(letters) + size
        if end > _MOST_ZIP:
            raise ValueError("the files are more than 4 GiB together")
        table += _CENTRAL.pack(
            b"PK\1\2", made_by, _VERSION, 0, _STORED, 0, _DATE, crc, size, size, len(letters), 0, 0, 0, 0, _ATTRIBUTES,
            offset,
        )  # fmt: skip
        table += letters
        count += 1
    if count > 0xFFFF:
        raise ValueError("there are more than 65,535 files")
    return bytes(table) + _END.pack(b"PK\5\6", 0, 0, count, count, len(table), end, 0)


def _archive(path: Path) -> tuple[dict[str, bytes], list[Problem]]:
    """The files of an archive by name, and where it is not the one that they make."""
    if not path.is_file():
        raise UnreadableError(f"{path}: there is no such file or folder")
    if path.stat().st_size > _MOST_ZIP:
        raise UnreadableError(f"{path} is no archive of `rewatch export`: it has more than 4 GiB")
    data = path.read_bytes()
    if data[:4] != b"PK\3\4" and data[-_END.size :][:4] != b"PK\5\6":
        raise UnreadableError(f"{path} is no archive of `rewatch export`")
    files: dict[str, bytes] = {}
    problems: list[Problem] = []
    entries: list[tuple[str, int, int, int]] = []
    at, last = 0, "the beginning"
    while data[at : at + 4] != b"PK\1\2":
        found = _entry(data, at, last)
        if isinstance(found, Problem):
            return files, [*problems, found]
        name, header, body = found
        crc = zlib.crc32(body)
        if header != local_header(name, crc, len(body)):
            problems.append(Problem(name, f"its bytes are not those of its entry, at byte {at} of the archive"))
        if name in files:
            problems.append(Problem(name, "is there twice"))
        files[name] = body
        entries.append((name, crc, len(body), at))
        at, last = at + len(header) + len(body), name
    expected = directory(entries)
    rest = data[at:]
    if rest != expected:
        first = next(n for n, (a, b) in enumerate(zip_longest(rest, expected)) if a != b)
        what = f"byte {at + first} of the archive, in its table of contents"
        problems.append(Problem(_entry_at(entries, first), what))
    return files, problems


def _entry(data: bytes, at: int, last: str) -> tuple[str, bytes, bytes] | Problem:
    """Name, header and bytes of the file that begins here, or what is wrong with it."""
    nothing = Problem("archive", f"byte {at}: no entry where one should be, after {last}")
    if data[at : at + 4] != b"PK\3\4" or at + _LOCAL.size > len(data):
        return nothing
    fields = _LOCAL.unpack_from(data, at)
    method, size, begins = fields[3], fields[7], at + _LOCAL.size + fields[9]
    try:
        name = data[at + _LOCAL.size : begins].decode("ascii")
    except UnicodeDecodeError:
        return nothing
    wrong = ""
    if method != _STORED:
        wrong = "is compressed, and no export is: it was changed, or packed again; unpack it, and check the folder"
    elif not _name_in(name):
        wrong = f"is named as no file of an export, at byte {at} of the archive"
    elif begins + size > len(data):
        wrong = f"is cut off, at byte {at} of the archive"
    return Problem(name, wrong) if wrong else (name, data[at:begins], data[begins : begins + size])


def _entry_at(entries: Sequence[tuple[str, int, int, int]], offset: int) -> str:
    """The file whose line in the table of contents is at this offset of it."""
    for name, _, _, _ in entries:
        offset -= _CENTRAL.size + len(name)
        if offset < 0:
            return name
    return "archive"


def _folder(path: Path) -> tuple[dict[str, bytes], list[Problem]]:
    """The files of an unpacked archive by name, and what there is no file of its own kind."""
    files: dict[str, bytes] = {}
    problems: list[Problem] = []
    todo = [path]
    while todo:
        for entry in sorted(todo.pop().iterdir()):
            name = entry.relative_to(path).as_posix()
            mode = entry.lstat().st_mode
            if stat.S_ISDIR(mode):
                todo.append(entry)
            elif not stat.S_ISREG(mode) or not _name_in(name):
                problems.append(Problem(name, "is not of this export: it is no file, or is named as none of it"))
            else:
                files[name] = entry.read_bytes()
            if len(files) + len(problems) + len(todo) > _MOST_FILES:
                raise UnreadableError(f"{path} is no export of rewatch: it holds more than {_MOST_FILES} files")
    if MANIFEST not in files:
        raise UnreadableError(f"{path} is no export of rewatch: it holds no {MANIFEST}")
    return files, problems


def _name_in(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


# ---- the manifest ----


def root_of(manifest: Mapping[str, Any]) -> str:
    """The manifest's root: SHA-256 of all of it but the root."""
    rest = {name: value for name, value in manifest.items() if name != "root"}
    return hashlib.sha256(dumped(rest)).hexdigest()


def dumped(value: Any) -> bytes:
    """A value as the archive's JSON files hold it: one way to write each."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _manifest(data: bytes) -> tuple[dict[str, Any], list[Problem]]:
    try:
        manifest = json.loads(data)
        if not isinstance(manifest, dict) or manifest["format"] != FORMAT:
            said = manifest.get("format") if isinstance(manifest, dict) else None
            return {}, [Problem(MANIFEST, f"is of format {said!r}; this program reads {FORMAT}")]
        listed = [(file["name"], file["size"], file["sha256"]) for file in manifest["files"]]
        sound = all(isinstance(name, str) and _name_in(name) for name, _, _ in listed)
        sound = sound and all(isinstance(lack["what"] + lack["why"], str) for lack in manifest["missing"])
        if dumped(manifest) != data or root_of(manifest) != manifest["root"] or not sound:
            return manifest, [Problem(MANIFEST, f"is not as it was written: its root is {root_of(manifest)}")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return {}, [Problem(MANIFEST, f"cannot be read: {type(error).__name__}: {error}")]
    return manifest, []


def _against(manifest: Mapping[str, Any], files: Mapping[str, bytes], named: set[str]) -> Iterator[Problem]:
    """Where the files are others than the manifest says; `named` are those that are known to be."""
    listed = manifest["files"]
    for file in listed:
        name = file["name"]
        if name in named:
            continue
        if name not in files:
            yield Problem(name, "is missing")
        elif (sha256 := hashlib.sha256(files[name]).hexdigest()) != file["sha256"] or len(files[name]) != file["size"]:
            yield Problem(name, f"was changed: its SHA-256 is {sha256}, {MANIFEST} says {file['sha256']}")
    expected = {file["name"] for file in listed} | {MANIFEST, SIGNATURE}
    for name in sorted(files.keys() - expected):
        yield Problem(name, f"is not of this export: {MANIFEST} does not list it")


# ---- the records and their chain ----


def _contents(manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> tuple[list[str], list[Problem]]:
    """The links of the chain that hold, and what does not."""
    records: dict[str, Any] = {}
    problems: list[Problem] = []
    for name in sorted(files):
        if name.startswith("records/") and name.endswith(".json"):
            try:
                records[name[len("records/") : -len(".json")]] = _record(name, files)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IndexError) as error:
                problems.append(Problem(name, f"is not what its Avro bytes say: {error}"))
    links: list[str] = []
    if not problems:
        try:
            for link, holds, where in _chain(manifest, files, records):
                if holds:
                    links.append(link)
                else:
                    problems.append(Problem(where, f"does not hold: {link}"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IndexError) as error:
            problems.append(Problem(MANIFEST, f"its chain cannot be followed: {type(error).__name__}: {error}"))
    return links, problems


def _record(name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """A record decoded from its Avro bytes, which have to say what the JSON says."""
    said = json.loads(files[name])
    avro = name[: -len(".json")] + ".avro"
    found = decoded(json.loads(files[said["schema"]]), files[avro])
    if dumped(plain(found)) != dumped(said["record"]):
        raise ValueError(f"{avro} holds another record")
    return dict(found)


def _chain(
    manifest: Mapping[str, Any], files: Mapping[str, bytes], records: Mapping[str, Any]
) -> Iterator[tuple[str, bool, str]]:
    """Each link in words, whether it holds, and the file that is to blame where not."""
    event = records["risk_events"]
    chain = manifest["chain"]
    camera = event["camera_id"]
    yield "the verdict is of the event that the manifest names", event["event_id"] == manifest["event_id"], MANIFEST
    images = 0
    for number in range(1, len(event["frame_ids"]) + 1):
        said = chain["frames"][number - 1]
        yield from _frame(number, event, said, files, records)
        images += said["image"] is not None
    yield f"{images} images have the SHA-256 that their frame's id is made of", True, MANIFEST
    said_missing = {lack["what"] for lack in manifest["missing"]}
    for part in _absent(chain["frames"], records):
        if part not in said_missing:
            yield f"{part} is in this export, or said to be missing", False, MANIFEST
    yield (
        "the manifest's chain names these frames and no others",
        len(chain["frames"]) == len(event["frame_ids"]),
        MANIFEST,
    )
    batch = f"{camera}:{digest(*event['frame_ids'])}"
    yield f"batch_id {batch} is made of the frames' ids", batch == event["batch_id"] == chain["batch_id"], MANIFEST
    for name in ("batches", "contexts"):
        if name in records:
            window = records[name] if name == "batches" else records[name]["batch"]
            same = [frame["frame_id"] for frame in window["frames"]] == list(event["frame_ids"])
            right = same and window["batch_id"] == records[name]["batch_id"] == batch
            yield f"{name}: the window of these frames", right, f"records/{name}.json"
    made = f"{batch}:{event['run']}"
    yield f"event_id {made} is made of batch_id and run", made == event["event_id"] == chain["event_id"], MANIFEST
    level = risk_level(event["risk_score"])
    yield f"score {event['risk_score']} is level {level}", level == event["risk_level"], "records/risk_events.json"
    verdict = {name: event[name] for name in VERDICT}
    yield "verdict.json is the record's", files["verdict.json"] == dumped(plain(verdict)), "verdict.json"
    asked = event["rendered_prompt"].encode()
    yield "prompt.json is what the model was asked, byte for byte", files["prompt.json"] == asked, "prompt.json"
    if "prompts" in records:
        yield from _judge(event, records["prompts"], chain)


def _absent(frames: Sequence[Mapping[str, Any]], records: Mapping[str, Any]) -> Iterator[str]:
    """What the chain names and is not there, as `missing` names it. A camera's settings need not have a record."""
    names = ["contexts", "batches", "prompts"]
    for number, frame in enumerate(frames, 1):
        names += [f"frames-{number:03}", f"detections-{number:03}"]
        if frame["image"] is None:
            yield f"image {number:03}"
    yield from (f"record {name}" for name in names if name not in records)


def _frame(
    number: int,
    event: Mapping[str, Any],
    said: Mapping[str, Any],
    files: Mapping[str, bytes],
    records: Mapping[str, Any],
) -> Iterator[tuple[str, bool, str]]:
    """The links of one frame; those that hold are counted, not told."""
    name, frame_id, camera = f"{number:03}", event["frame_ids"][number - 1], event["camera_id"]
    wrong: list[tuple[str, str]] = []
    if said["frame_id"] != frame_id:
        wrong.append((MANIFEST, f"frame {number} of the manifest's chain is the verdict's"))
    frame = records.get(f"frames-{name}")
    if frame is not None:
        sha256 = frame["sha256"]
        made = f"{camera}:{sha256[:_DIGEST_HEX]}"
        if frame["captured_at"] is not None:
            made += f":{frame['captured_at']}"
        if not made == frame["frame_id"] == frame_id or frame["camera_id"] != camera or said["sha256"] != sha256:
            wrong.append((f"records/frames-{name}.json", f"frame_id {frame_id} is made of its image's SHA-256"))
        if frame["image"] is not None and hashlib.sha256(frame["image"]).hexdigest() != sha256:
            wrong.append((f"records/frames-{name}.avro", "the image inside its record has the record's SHA-256"))
    if said["image"] is not None:
        body = files[said["image"]]
        if hashlib.sha256(body).hexdigest() != said["sha256"] or not frame_id.startswith(
            f"{camera}:{said['sha256'][:_DIGEST_HEX]}"
        ):
            wrong.append((said["image"], f"has the SHA-256 that frame_id {frame_id} is made of"))
    seen = records.get(f"detections-{name}")
    if seen is not None and seen["frame_id"] != frame_id:
        wrong.append((f"records/detections-{name}.json", f"is of frame {frame_id}"))
    for where, link in wrong:
        yield link, False, where


def _judge(
    event: Mapping[str, Any], prompt: Mapping[str, Any], chain: Mapping[str, Any]
) -> Iterator[tuple[str, bool, str]]:
    """The links of what judged: prompt version, parameters, model."""
    version = digest(prompt["template"], prompt["output_schema"], prompt["parameters"])
    right = version == prompt["digest"] == event["prompt_digest"] == chain["prompt_digest"]
    yield f"prompt_digest {version} is made of template, output schema and parameters", right, "records/prompts.json"
    parameters = json.dumps(json.loads(event["parameters"]), sort_keys=True)
    model = event["model_digest"] or f"model:{event['model']}"
    verdict = digest(prompt["template"], prompt["output_schema"], parameters, model)
    right = verdict == event["verdict_digest"] == chain["verdict_digest"]
    yield f"verdict_digest {verdict} is made of prompt, parameters and model", right, "records/risk_events.json"


VERDICT = (
    *("risk_score", "risk_level", "summary", "reasoning", "risk_factors", "entities", "recommended_action"),
    *("model", "model_digest", "prompt_digest", "verdict_digest", "parameters", "conditions", "raw_completion"),
)
"""The fields of the record that `verdict.json` repeats."""


def digest(*parts: str) -> str:
    """The digest that ids are made with: 128 bits of SHA-256 over the parts, each with its length before it."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode()
        sha.update(len(data).to_bytes(8, "big"))
        sha.update(data)
    return sha.hexdigest()[:_DIGEST_HEX]


def risk_level(score: int) -> str:
    """The level of a score from 0 to 100."""
    return "low" if score < 30 else "medium" if score < 60 else "high" if score < 85 else "critical"


# ---- Avro, as the specification has it ----


def decoded(schema: Any, data: bytes) -> Any:
    """The record in these bytes: a zero byte and a 4-byte id (Confluent's framing), then Avro of this schema.

    Raises:
        ValueError: it is none.
    """
    if data[:1] != b"\0" or len(data) < 5:
        raise ValueError("its Avro bytes are not framed")
    reader = _Avro(data, 5)
    value = reader.read(schema)
    if reader.at != len(data):
        raise ValueError("bytes are left over behind the record")
    return value


def plain(value: Any) -> Any:
    """A decoded value as JSON can hold it; bytes are told by their length and hash."""
    if isinstance(value, bytes):
        return {"bytes": len(value), "sha256": hashlib.sha256(value).hexdigest()}
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return value


class _Avro:
    """Reads Avro's binary encoding, by the schema that it was written with."""

    def __init__(self, data: bytes, at: int) -> None:
        self.at = at
        self._data = data
        self._names: dict[str, Any] = {}
        self._items = 0
        self._primitives: dict[str, Callable[[], Any]] = {
            "null": lambda: None,
            "boolean": lambda: (False, True)[self._take(1)[0]],
            "int": self._long,
            "long": self._long,
            "float": lambda: struct.unpack("<f", self._take(4))[0],
            "double": lambda: struct.unpack("<d", self._take(8))[0],
            "bytes": lambda: self._take(self._long()),
            "string": lambda: self._take(self._long()).decode(),
        }

    def read(self, schema: Any) -> Any:
        """The next value, of this schema."""
        if isinstance(schema, list):
            return self.read(schema[self._index(len(schema))])
        if isinstance(schema, str):
            return self.read(self._names[schema]) if schema in self._names else self._primitive(schema)
        kind = schema["type"]
        if kind == "record":
            full = f"{schema['namespace']}.{schema['name']}" if schema.get("namespace") else schema["name"]
            self._names[full] = self._names[full.rpartition(".")[2]] = schema
            return {field["name"]: self.read(field["type"]) for field in schema["fields"]}
        if kind == "array":
            return [self.read(schema["items"]) for _ in self._blocks()]
        if kind == "map":
            return {self._primitive("string"): self.read(schema["values"]) for _ in self._blocks()}
        return self.read(kind)

    def _primitive(self, kind: str) -> Any:
        if kind not in self._primitives:
            raise ValueError(f"the schema has a type {kind!r}, which no record of rewatch has")
        return self._primitives[kind]()

    def _blocks(self) -> Iterator[None]:
        """As often as an array or a map has items."""
        while count := self._long():
            if count < 0:
                self._long()  # the block's bytes, for who wants to skip it
                count = -count
            self._items += count
            if self._items > _MOST_ITEMS:
                raise ValueError(f"it claims more than {_MOST_ITEMS} items")
            yield from (None for _ in range(count))

    def _index(self, count: int) -> int:
        index = self._long()
        if not 0 <= index < count:
            raise ValueError(f"a choice of {count} has no {index}")
        return index

    def _long(self) -> int:
        value = shift = 0
        while True:
            byte = self._take(1)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return (value >> 1) ^ -(value & 1)
            if shift > 63:
                raise ValueError("a number is longer than 64 bits")

    def _take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self._data):
            raise ValueError("it ends in the middle of a value")
        self.at += count
        return self._data[self.at - count : self.at]


# ---- the signature: Ed25519 (RFC 8032), so that no package is needed to check it ----

_P = 2**255 - 19
_ORDER = 2**252 + 27742317777372353535851937790883648493
_D = -121665 * pow(121666, _P - 2, _P) % _P
_ROOT = pow(2, (_P - 1) // 4, _P)
_SPKI = bytes.fromhex("302a300506032b6570032100")
"""What stands before the 32 bytes of an Ed25519 key in a public key's DER (RFC 8410)."""

_Point = tuple[int, int, int, int]


def public_key(pem: bytes) -> bytes:
    """The 32 bytes of an Ed25519 public key in PEM.

    Raises:
        UnreadableError: it is none.
    """
    lines = [line.strip() for line in pem.splitlines()]
    try:
        first, last = lines.index(b"-----BEGIN PUBLIC KEY-----"), lines.index(b"-----END PUBLIC KEY-----")
        der = base64.b64decode(b"".join(lines[first + 1 : last]), validate=True)
    except (ValueError, binascii.Error):
        der = b""
    if len(der) != len(_SPKI) + 32 or not der.startswith(_SPKI):
        raise UnreadableError("--key: it holds no Ed25519 public key in PEM (openssl pkey -pubout makes one)")
    return der[len(_SPKI) :]


def _signature(files: Mapping[str, bytes], key: bytes | None) -> tuple[str, list[Problem]]:
    """SHA-256 of the key that signed the manifest, and what is wrong with it."""
    if SIGNATURE not in files:
        return "", [] if key is None else [Problem(SIGNATURE, "is missing: this export is not signed")]
    try:
        said = json.loads(files[SIGNATURE])
        public, signature = bytes.fromhex(said["public_key"]), bytes.fromhex(said["signature"])
        right = files[SIGNATURE] == signature_file(public, signature) and signed(public, files[MANIFEST], signature)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", [Problem(SIGNATURE, "cannot be read")]
    name = hashlib.sha256(public).hexdigest()
    if not right:
        return name, [Problem(SIGNATURE, f"is no signature of {MANIFEST} by its key")]
    if key is not None and key != public:
        return name, [Problem(SIGNATURE, f"is by another key: SHA-256 {name}, not {hashlib.sha256(key).hexdigest()}")]
    return name, []


def signature_file(public: bytes, signature: bytes) -> bytes:
    """The contents of `MANIFEST.sig`."""
    return dumped({"algorithm": "Ed25519", "public_key": public.hex(), "signature": signature.hex()})


def signed(public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether the signature of the message is this key's."""
    if len(public) != 32 or len(signature) != 64:
        return False
    a, r = _point(public), _point(signature[:32])
    s = int.from_bytes(signature[32:], "little")
    if a is None or r is None or s >= _ORDER:
        return False
    h = int.from_bytes(hashlib.sha512(signature[:32] + public + message).digest(), "little") % _ORDER
    base = _point(bytes([0x58]) + bytes([0x66]) * 31)
    assert base is not None
    return _same(_times(s, base), _plus(r, _times(h, a)))


def _plus(p: _Point, q: _Point) -> _Point:
    a, b = (p[1] - p[0]) * (q[1] - q[0]) % _P, (p[1] + p[0]) * (q[1] + q[0]) % _P
    c, d = 2 * p[3] * q[3] * _D % _P, 2 * p[2] * q[2] % _P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % _P, g * h % _P, f * g % _P, e * h % _P


def _times(number: int, point: _Point) -> _Point:
    total: _Point = (0, 1, 1, 0)
    while number:
        if number & 1:
            total = _plus(total, point)
        point = _plus(point, point)
        number >>= 1
    return total


def _same(p: _Point, q: _Point) -> bool:
    return (p[0] * q[2] - q[0] * p[2]) % _P == 0 and (p[1] * q[2] - q[1] * p[2]) % _P == 0


def _point(data: bytes) -> _Point | None:
    """The point that 32 bytes name; None where they name none."""
    y = int.from_bytes(data, "little")
    sign, y = y >> 255, y & ((1 << 255) - 1)
    if y >= _P:
        return None
    square = (y * y - 1) * pow(_D * y * y + 1, _P - 2, _P) % _P
    x = pow(square, (_P + 3) // 8, _P)
    if (x * x - square) % _P:
        x = x * _ROOT % _P
    if (x * x - square) % _P or (x == 0 and sign):
        return None
    if x & 1 != sign:
        x = _P - x
    return x, y, 1, x * y % _P


def _shown(text: str) -> str:
    """Text without what steers a terminal: an archive may be anybody's."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
