"""`rewatch export`: an event as one archive, and that whoever changes one byte of it is found out."""

import io
import json
import random
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fastavro
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from infra.export import evidence as gathering
from infra.export import verify
from infra.export.archive import files_of, packed
from infra.export.evidence import Evidence
from infra.export.signing import sign
from infra.export.verify import MANIFEST, SIGNATURE, Verified
from schemas import avro_schemas
from schemas.prompts import default
from streams.claims import ClaimStore
from tests.infra.cli_kit import answer, invoke
from tests.infra.export_kit import CAMERA, Site, evidence, picture, site
from tests.schemas import recorded

pytest_plugins = ["tests.clickhouse_kit"]
pytestmark = pytest.mark.real

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture(scope="module")
def here(clickhouse_url: str, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return site(clickhouse_url, tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def kept(here: Site) -> Evidence:
    return evidence(here)


@pytest.fixture(scope="module")
def files(kept: Evidence) -> dict[str, bytes]:
    return files_of(kept, version="0.0.1")


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., Verified]:
    """Verifies an archive of these bytes."""

    def verified(archive: bytes, key: bytes | None = None) -> Verified:
        path = tmp_path / "x.zip"
        path.write_bytes(archive)
        return verify.verify(path, key)

    return verified


def unpacked(files: Mapping[str, bytes], folder: Path) -> Path:
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    return folder


def relisted(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files with a manifest that fits them: a forger's work."""
    manifest = json.loads(files[MANIFEST])
    rest = {name: body for name, body in files.items() if name != MANIFEST}
    manifest["files"] = [
        {"name": name, "size": len(body), "sha256": verify.hashlib.sha256(body).hexdigest()}
        for name, body in rest.items()
    ]
    manifest["root"] = verify.root_of(manifest)
    return rest | {MANIFEST: verify.dumped(manifest)}


def test_an_archive_holds_images_records_prompt_and_verdict_and_is_whole(
    files: dict[str, bytes], check: Callable[..., Verified], here: Site
) -> None:
    found = check(packed(files))
    assert (found.problems, found.missing, found.signed_by) == ((), (), "")
    assert found.event_id == here.event.event_id
    assert len(found.links) >= 10
    assert [files[f"images/00{n}.jpg"] for n in (1, 2, 3)] == [picture(n) for n in range(3)]
    names = {name.removeprefix("records/").removesuffix(".avro") for name in files if name.endswith(".avro")}
    each = {f"{topic}-00{n}" for topic in ("frames", "detections") for n in (1, 2, 3)}
    assert names == each | {"batches", "contexts", "risk_events", "prompts", "cameras"}
    assert json.loads(files["prompt.json"]) == [{"role": "user", "content": "A window: é"}]
    assert json.loads(files["verdict.json"])["risk_score"] == here.event.risk_score
    with zipfile.ZipFile(io.BytesIO(packed(files))) as ordinary:  # any program can unpack it
        assert ordinary.testzip() is None
        assert {name: ordinary.read(name) for name in ordinary.namelist()} == files


def test_the_same_event_makes_the_same_bytes(here: Site, files: dict[str, bytes]) -> None:
    again = files_of(evidence(here), version="0.0.1")
    assert packed(again) == packed(files)
    assert packed(again, lambda message: sign(KEY, message)) == packed(files, lambda message: sign(KEY, message))
    # In another process, too: Avro's parser has its keys in an order by chance.
    for name in [name for name in files if name.endswith(".avsc")]:
        schema = json.loads(files[name])
        assert list(schema) == sorted(schema)


def test_one_flipped_byte_anywhere_is_named(
    files: dict[str, bytes], check: Callable[..., Verified], tmp_path: Path
) -> None:
    archive = packed(files, lambda message: sign(KEY, message))
    assert check(archive).whole
    begins = {
        name: archive.index(verify.local_header(name, zlib.crc32(body), len(body))) for name, body in files.items()
    }
    chance = random.Random(7)
    for name, at in begins.items():
        # Its bytes; then time, checksum and version in its entry; its name, which then is another's, or nobody's.
        for offset in (30 + len(name) + chance.randrange(len(files[name])), 4, 10, 14):
            assert {problem.where for problem in check(_flipped(archive, at + offset)).problems} == {name}
        said = " ".join(map(str, check(_flipped(archive, at + 30)).problems))
        assert name in said or f"byte {at} " in said
        # Where its entry says where the next one begins, the place is named.
        for offset in (0, 18, 26, 28):
            said = " ".join(map(str, check(_flipped(archive, at + offset)).problems))
            assert name in said or f"byte {at}" in said or f"after {name}" in said, (offset, said)
    for at in range(archive.index(b"PK\1\2"), len(archive), 5):
        assert check(_flipped(archive, at)).problems, at
    # A folder has no archive around it: the bytes of each file alone.
    folder = unpacked(files, tmp_path / "folder")
    assert verify.verify(folder).whole
    for name, body in files.items():
        (folder / name).write_bytes(_flipped(body, chance.randrange(len(body))))
        assert [problem.where for problem in verify.verify(folder).problems] == [name]
        (folder / name).write_bytes(body)


def test_what_was_added_left_out_or_put_behind_is_named(
    files: dict[str, bytes], check: Callable[..., Verified], tmp_path: Path
) -> None:
    more = packed(files | {"images/004.jpg": b"x"})
    assert [str(problem) for problem in check(more).problems] == [
        f"images/004.jpg: is not of this export: {MANIFEST} does not list it"
    ]
    less = packed({name: body for name, body in files.items() if name != "images/002.jpg"})
    assert [str(problem) for problem in check(less).problems] == ["images/002.jpg: is missing"]
    archive = packed(files)
    for odd in (archive + b"\0", b"" + archive[:-1], archive[: len(archive) // 2]):
        assert not check(odd).whole
    folder = unpacked(files, tmp_path / "folder")
    (folder / "images" / "001.jpg").unlink()
    (folder / "images" / "001.jpg").symlink_to("/etc/hostname")
    assert any(problem.where == "images/001.jpg" for problem in verify.verify(folder).problems)


def test_who_rewrites_the_manifest_too_is_found_out_by_the_chain(
    files: dict[str, bytes], check: Callable[..., Verified]
) -> None:
    """A forger who keeps every hash of the manifest right breaks a link, and the file to blame is named."""
    risk = json.loads(files["records/risk_events.json"])
    harmless = json.loads(json.dumps(risk))
    harmless["record"]["risk_score"] = 3
    chain = json.loads(files[MANIFEST])
    chain["chain"]["frames"][0], chain["chain"]["frames"][1] = chain["chain"]["frames"][1], chain["chain"]["frames"][0]
    forged: dict[str, Mapping[str, bytes]] = {
        "images/002.jpg": files | {"images/002.jpg": picture(9)},
        "records/risk_events.json": files | {"records/risk_events.json": verify.dumped(harmless)},
        "records/frames-003.json": files | {"records/frames-003.avro": files["records/frames-002.avro"]},
        "verdict.json": files | {"verdict.json": files["verdict.json"].replace(b"why", b"who")},
        "prompt.json": files | {"prompt.json": b"[]"},
        MANIFEST: files | {MANIFEST: verify.dumped(chain)},
        "records/prompts.json": files | _rewritten(files, "prompts", {"template": default().template + " "}),
        "records/batches.json": files | _rewritten(files, "batches", {"batch_id": f"{CAMERA}:{'0' * 32}"}),
    }
    for name, changed in forged.items():
        found = check(packed(relisted(changed)))
        assert not found.whole
        assert name in {problem.where for problem in found.problems}, (name, found.problems)


def test_a_part_that_the_chain_names_is_there_or_is_said_to_be_missing(
    files: dict[str, bytes], check: Callable[..., Verified]
) -> None:
    """A forger who drops a part, and rewrites the manifest to fit, has to say what is gone: so does the result."""
    parts = {f"record {topic}-00{n}" for topic in ("frames", "detections") for n in (1, 2, 3)}
    parts |= {f"image 00{n}" for n in (1, 2, 3)} | {f"record {name}" for name in ("contexts", "batches", "prompts")}
    for part in sorted(parts):
        kind, name = part.split()
        gone = {"images/" + name + ".jpg"} if kind == "image" else {f"records/{name}.json", f"records/{name}.avro"}
        manifest = json.loads(files[MANIFEST])
        if kind == "image":
            manifest["chain"]["frames"][int(name) - 1]["image"] = None
        left = {name: body for name, body in files.items() if name not in gone}
        found = check(packed(relisted(left | {MANIFEST: verify.dumped(manifest)})))
        assert [str(problem) for problem in found.problems] == [
            f"{MANIFEST}: does not hold: {part} is in this export, or said to be missing"
        ]
        manifest["missing"].append({"what": part, "why": "it is gone"})
        found = check(packed(relisted(left | {MANIFEST: verify.dumped(manifest)})))
        assert (found.whole, found.missing) == (True, (f"{part}: it is gone",))


def test_what_an_unsigned_export_does_not_show_is_said_at_its_end(
    files: dict[str, bytes], check: Callable[..., Verified]
) -> None:
    """Its page can be replaced, and its manifest rewritten: nothing but a signature, or its root, tells."""
    forged = relisted(files | {"index.html": b"nothing happened"})
    found = check(packed(forged))
    assert found.whole
    *_, last = verify.told(found)
    assert last.startswith("the parts fit together; who exported it is not shown (a signature shows that)")
    assert "index.html is not checked against the records" in last
    assert not any("as it was exported" in line for line in verify.told(found))
    archive = packed(forged, lambda message: sign(KEY, message))
    *_, last = verify.told(check(archive))
    assert last == "whole: everything is as it was signed by that key"
    *_, last = verify.told(check(archive, KEY.public_key().public_bytes_raw()))
    assert last == "whole: everything is as it was exported"


def test_a_signature_names_its_key_and_a_forger_has_none(
    files: dict[str, bytes], check: Callable[..., Verified], tmp_path: Path
) -> None:
    archive = packed(files, lambda message: sign(KEY, message))
    public = KEY.public_key().public_bytes_raw()
    found = check(archive, public)
    assert (found.whole, found.known) == (True, True)
    assert found.signed_by == verify.hashlib.sha256(public).hexdigest()
    other = Ed25519PrivateKey.generate()
    assert [problem.where for problem in check(archive, other.public_key().public_bytes_raw()).problems] == [SIGNATURE]
    assert [problem.where for problem in check(packed(files), public).problems] == [SIGNATURE]
    harmless = relisted(files | {"index.html": b"nothing happened"})
    kept_signature = packed(harmless, lambda _: sign(KEY, files[MANIFEST]))
    assert [problem.where for problem in check(kept_signature).problems] == [SIGNATURE]
    signed_anew = check(packed(harmless, lambda message: sign(other, message)), public)
    assert [problem.where for problem in signed_anew.problems] == [SIGNATURE]


def test_the_signature_check_agrees_with_the_library() -> None:
    for n in range(4):
        key = Ed25519PrivateKey.generate()
        public, signature = key.public_key().public_bytes_raw(), key.sign(b"m" * n)
        assert verify.signed(public, b"m" * n, signature)
        assert not verify.signed(public, b"m" * n + b"x", signature)
        assert not verify.signed(public, b"m" * n, _flipped(signature, 8 * n))
        # S + L verifies the same equation; RFC 8032 refuses it, so that a signature has one form.
        order = 2**252 + 27742317777372353535851937790883648493
        s = (int.from_bytes(signature[32:], "little") + order).to_bytes(32, "little")
        assert not verify.signed(public, b"m" * n, signature[:32] + s)
    assert not verify.signed(b"\xff" * 32, b"", b"\0" * 64)


def test_names_that_lead_elsewhere_and_bombs_are_refused_and_nothing_is_unpacked(
    files: dict[str, bytes], check: Callable[..., Verified], tmp_path: Path
) -> None:
    for name in ("../evil", "/etc/evil", "images/../../evil", "images\\evil", ".hidden", "a//b", "x\x1b[2J"):
        found = check(packed({name: b"x"} | files))
        assert any("named as no file" in problem.what for problem in found.problems), name
        assert "\x1b" not in "".join(verify.told(found))
        assert not check(packed(relisted(files | {"images/001.jpg": b""})).replace(b"images/001", b"images/../")).whole
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as writing:
        writing.writestr("images/001.jpg", b"\0" * 50_000_000)
    found = check(bomb.getvalue())
    assert [problem.what.split(",")[0] for problem in found.problems] == ["is compressed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.zip"]
    avro = {"type": "record", "name": "R", "fields": [{"name": "a", "type": {"type": "array", "items": "null"}}]}
    with pytest.raises(ValueError, match="claims more than"):
        verify.decoded(avro, b"\0" * 5 + b"\xfe\xff\xff\xff\x0f")
    with pytest.raises(verify.UnreadableError):
        check(b"\x7fELF no archive at all")


def test_hostile_manifests_and_records_are_problems_and_no_faults(
    files: dict[str, bytes], check: Callable[..., Verified]
) -> None:
    manifest = json.loads(files[MANIFEST])
    for odd in (b"", b"[]", b"{}", b"[" * 100_000, b'{"format": "rewatch-export/2"}', b"\xff", b"1e999999"):
        assert not check(packed(files | {MANIFEST: odd})).whole
    for part, value in (("files", [{}]), ("files", 3), ("chain", None), ("event_id", []), ("missing", 3), ("root", 1)):
        changed = manifest | {part: value}
        changed["root"] = verify.root_of(changed) if part != "root" else value
        assert not check(packed(files | {MANIFEST: verify.dumped(changed)})).whole, part
    for odd in (b"{}", b"[" * 100_000, b'{"schema": "../x", "record": {}}'):
        assert not check(packed(relisted(files | {"records/batches.json": odd}))).whole
    for odd in (b"", b"\0", b"\0" * 5 + b"\x80" * 20, files["records/batches.avro"] + b"\0"):
        found = check(packed(relisted(files | {"records/batches.avro": odd})))
        assert [problem.where for problem in found.problems] == ["records/batches.json"]


def test_the_avro_reader_reads_what_fastavro_reads_of_every_version_of_every_schema() -> None:
    for topic, number in recorded.versions():
        value = recorded.load(topic, number).incoming.value
        assert value is not None
        schema = avro_schemas.history(topic)[number - 1]
        body = io.BytesIO(value[5:])
        assert verify.decoded(schema, value) == fastavro.schemaless_reader(body, schema, schema)


def test_verify_py_needs_nothing_but_python(files: dict[str, bytes], tmp_path: Path) -> None:
    folder = unpacked(files, tmp_path / "folder")
    # -I: neither this environment's packages nor its paths; no network is asked by anything that it imports.
    bare = [sys.executable, "-I", "-S", str(folder / "verify.py")]
    fine = subprocess.run(bare, capture_output=True, text=True, check=False)
    assert (fine.returncode, fine.stderr) == (0, "")
    assert fine.stdout.splitlines()[-1].startswith("the parts fit together; ")
    (folder / "images" / "003.jpg").write_bytes(picture(1))
    changed = subprocess.run([*bare, str(folder)], capture_output=True, text=True, check=False)
    assert changed.returncode == 1
    assert "images/003.jpg: was changed" in changed.stdout
    assert subprocess.run([*bare, "nowhere.zip"], capture_output=True, check=False).returncode == 2


def test_the_page_runs_nothing_loads_nothing_and_shows_everything(files: dict[str, bytes], here: Site) -> None:
    page = files["index.html"].decode()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert (
        re.findall(r"(?:src|href)=\"(?!data:|#|images/|records/|schemas/|verdict|prompt|MANIFEST)[^\"]*\"", page) == []
    )
    assert page.count("data:image/jpeg;base64,") == 3
    for part in (here.event.event_id, here.event.verdict_digest, *here.event.frame_ids, "verify.py", "person 0.93"):
        assert part in page


def test_what_is_not_kept_any_more_is_named_and_the_rest_is_exported(
    clickhouse_url: str, tmp_path: Path, check: Callable[..., Verified]
) -> None:
    there = site(clickhouse_url, tmp_path / "images", without=("frames", "contexts", "prompts"))
    for image in (tmp_path / "images").rglob("*"):
        if image.is_file():
            image.unlink()
    found = check(packed(files_of(evidence(there), version="0.0.1")))
    assert found.problems == ()
    lacking = {lack.split(":")[0] for lack in found.missing}
    assert lacking == {
        *(f"record frames-00{n}" for n in (1, 2, 3)),
        *(f"image 00{n}" for n in (1, 2, 3)),
        *("record contexts", "record prompts"),
    }
    assert not any(str(tmp_path) in lack for lack in found.missing)


async def test_an_image_that_is_not_what_its_hash_says_is_named_and_left_out(kept: Evidence, tmp_path: Path) -> None:
    frame = kept.records["frames-001"]
    rotten = frame._replace(record={**frame.record, "image": picture(9)})
    shot, why = await gathering._shot(ClaimStore(str(tmp_path)), frame.record["frame_id"], None, rotten)
    assert (shot.image, shot.sha256, why) == (None, frame.record["sha256"], "its bytes are not what they were")


def test_the_command_writes_signs_and_verifies(
    here: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "CLICKHOUSE__URL": here.settings.url,
        "CLICKHOUSE__DATABASE": here.settings.database,
        "IMAGES": str(here.images),
    }.items():
        monkeypatch.setenv(f"REWATCH_{name}", value)
    private, public = _pem(tmp_path)
    told = answer("export", here.event.event_id[:12], "-o", "signed.zip", "--sign-key", str(private))
    assert (told["event_id"], told["missing"], told["signed"]) == (here.event.event_id, [], True)
    assert (tmp_path / "signed.zip").stat().st_mode & 0o777 == 0o600
    checked = answer("export", "verify", "signed.zip", "--key", str(public))
    assert (checked["whole"], checked["root"], checked["signed_by_the_given_key"]) == (True, told["root"], True)
    assert invoke("export", here.event.event_id).exit_code == 0
    [unsigned] = tmp_path.glob(f"{CAMERA}-*.zip")
    unsigned.write_bytes(_flipped(unsigned.read_bytes(), 5_000))
    result = invoke("export", "verify", str(unsigned))
    assert result.exit_code == 1
    assert "NOT as it was exported" in result.output
    assert invoke("export", "gate:no-such-event").exit_code == 1
    for arguments in (
        ("verify", "nowhere.zip"),
        ("verify", str(private)),
        (here.event.event_id, "--sign-key", str(public)),
    ):
        wrong = invoke("export", *arguments)
        assert wrong.exit_code == 2
        assert "Traceback" not in wrong.output


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def _rewritten(files: Mapping[str, bytes], topic: str, changes: dict[str, Any]) -> dict[str, bytes]:
    """A record's two files after somebody wrote it anew, in Avro too."""
    described = json.loads(files[f"records/{topic}.json"])
    schema = avro_schemas.current(topic)
    value = io.BytesIO(files[f"records/{topic}.avro"])
    value.seek(5)
    record = fastavro.schemaless_reader(value, schema, schema)
    record |= changes
    out = io.BytesIO()
    fastavro.schemaless_writer(out, schema, record)
    avro = files[f"records/{topic}.avro"][:5] + out.getvalue()
    described["record"] = verify.plain(verify.decoded(schema, avro))
    return {f"records/{topic}.json": verify.dumped(described), f"records/{topic}.avro": avro}


def _pem(directory: Path) -> tuple[Path, Path]:
    private, public = directory / "key.pem", directory / "public.pem"
    plain = serialization.NoEncryption()
    private.write_bytes(KEY.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(
        KEY.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public
