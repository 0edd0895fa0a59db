"""The log lines: found by their ids, in the form that was asked for, and never with a secret."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from structlog.contextvars import bound_contextvars

from infra import logs
from infra.config import ConfigError, load
from infra.masks import MASK, Masks, secrets_of
from processors.analyze.fakes import FakeLlm
from processors.analyze.settings import LlmSettings
from processors.analyze.stage import build as build_analyze
from processors.batch.stage import build as build_batch
from processors.detect.detector import FakeDetector
from processors.detect.settings import DetectorSettings
from processors.detect.stage import DetectStage
from processors.enrich.stage import build as build_enrich
from schemas.records import Detections
from streams import codec
from streams.claims import ClaimStore
from streams.messages import Emit, Incoming, Tick
from tests.processors.analyze_samples import answer
from tests.processors.batch_kit import DEFAULT, T0, box, on_log, read_batch, seen
from tests.processors.test_detect import frame, jpeg

SECRETS = {
    "REWATCH_KAFKA__SASL_PASSWORD": "sasl-hunter2",
    "REWATCH_CLICKHOUSE__PASSWORD": "click-hunter2",
    "REWATCH_LLM__API_KEY": "llm-hunter2",
    "REWATCH_INGEST__UPLOAD__API_KEY": "upload-hunter2",
    "REWATCH_METRICS__API_KEY": "metrics-hunter2",
    "RTDETR_API_KEY": "detector-hunter2",
}

SASL = {
    "REWATCH_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:9",
    "REWATCH_KAFKA__SECURITY_PROTOCOL": "SASL_PLAINTEXT",
    "REWATCH_KAFKA__SASL_USERNAME": "me",
}
"""What a password of the broker is refused without."""


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_json_line_carries_what_happened_the_ids_and_the_stage(capsys: pytest.CaptureFixture[str]) -> None:
    logs.to_stderr("info", "json", stage="analyze")
    with bound_contextvars(batch="yard:1", camera="yard", _event="yard:1:live"):
        structlog.get_logger().info("judged", score=71)
    (line,) = lines(capsys)
    said = json.loads(line)
    assert said.pop("timestamp").endswith("Z")
    assert list(said.items()) == [
        ("level", "info"),
        ("msg", "judged"),
        ("stage", "analyze"),
        ("event", "yard:1:live"),
        ("batch", "yard:1"),
        ("camera", "yard"),
        ("score", 71),
    ]


def test_a_logfmt_line_is_for_grep_and_its_traceback_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    logs.to_stderr("info", "logfmt", stage="batch")
    try:
        raise ValueError("a cat\nwalked over it")
    except ValueError:
        structlog.get_logger().exception("broke", camera="yard")
    first, *traceback = lines(capsys)
    assert "level=error msg=broke stage=batch camera=yard" in first
    assert traceback[0].startswith("Traceback")
    assert "ValueError: a cat" in traceback


def test_a_line_below_the_level_is_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    logs.to_stderr("warning", "logfmt")
    structlog.get_logger().info("quiet")
    structlog.get_logger().warning("loud")
    (line,) = lines(capsys)
    assert "msg=loud" in line


def test_a_stage_that_a_line_names_itself_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    logs.to_stderr("info", "json", stage="detect")
    structlog.get_logger().info("x", stage="other")
    assert json.loads(lines(capsys)[0])["stage"] == "other"


@pytest.mark.parametrize(("variable", "value"), [("REWATCH_LOG_FORMAT", "json"), ("REWATCH_LOG__FORMAT", "json")])
def test_the_format_comes_from_the_environment_by_its_short_name_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, value)
    assert load().log.format == "json"
    monkeypatch.setenv(variable, "xml")
    with pytest.raises(ConfigError, match=r"log\.format"):
        load()


def test_secrets_are_found_wherever_they_are_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {**SASL, **SECRETS}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(
        "REWATCH_INGEST__SNAPSHOTS",
        json.dumps({"yard": "http://root:camera-hunter2@10.0.0.9/a.jpg", "open": "http://10.0.0.8/a.jpg"}),
    )
    found = set(secrets_of(load()))
    assert set(SECRETS.values()) <= found
    assert any("camera-hunter2" in secret for secret in found)
    assert "http://10.0.0.8/a.jpg" not in found, "an address without a password is no secret"


def test_a_mask_covers_the_longer_of_two_secrets_and_leaves_words_alone() -> None:
    masks = Masks(["hunter2", "hunter2-and-more", "a"])
    assert masks.text("a key hunter2-and-more.") == f"a key {MASK}."
    assert masks.text("to kafka://me:pass@host:9092/x") == f"to kafka://{MASK}@host:9092/x"
    assert masks.text("http://me:p@ss@host/x") == f"http://{MASK}@host/x", "an @ that nobody escaped"
    assert masks.text("http://host/a?to=me@home or me@home") == "http://host/a?to=me@home or me@home"
    assert masks.value(["x", "hunter2"]) == f"['x', '{MASK}']"
    assert masks.value(7) == 7


_LOG_EVERYTHING = """
import logging, os, sys
import structlog
from infra import logs
from infra.config import load
from infra.masks import secrets_of

settings = load()
for style in ("console", "logfmt", "json"):
    logs.to_stderr("debug", style, stage="toy", secrets=secrets_of(settings))
    log = structlog.get_logger()
    log.info("settings", settings=settings.model_dump(), shown=str(settings))
    log.info("environment", **{name.lower(): value for name, value in os.environ.items() if "hunter2" in value})
    log.warning("away", why="http://me:url-hunter2@10.0.0.9/a.jpg: 401, Bearer llm-hunter2")
    try:
        raise RuntimeError("connecting with sasl-hunter2")
    except RuntimeError:
        log.exception("broke on click-hunter2")
        logging.getLogger("library").exception("broke with %s", "upload-hunter2")
"""


def test_no_line_of_any_form_holds_a_secret() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _LOG_EVERYTHING],
        env={"PATH": "", **SASL, **SECRETS},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert "hunter2" not in ended.stderr + ended.stdout
    assert ended.stderr.count(MASK) > 20
    machine = [json.loads(line) for line in ended.stderr.splitlines() if line.startswith("{")]
    assert [line["msg"] for line in machine] == [
        "settings",
        "environment",
        "away",
        f"broke on {MASK}",
        f"broke with {MASK}",
    ]
    assert machine[-1]["logger"] == "library", "libraries' lines come in the same form"
    assert all(line["stage"] == "toy" for line in machine)


_BREAK = """
import sys
from infra import topology
async def broken(*_, **__):
    raise RuntimeError("connecting with sasl-hunter2")
topology.run = broken
if sys.argv[1] == "worker":
    from infra import worker
    sys.argv[1:] = ["batch"]
    sys.exit(worker.main())
from infra.cli import main
sys.argv[1:] = ["run", "batch"]
main()
"""


@pytest.mark.parametrize("way", ["worker", "cli"])
def test_an_error_that_nobody_expects_ends_a_process_with_its_traceback_and_without_secrets(
    way: str, tmp_path: Path
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _BREAK, way],
        env={"PATH": "", "PYTHONPATH": str(Path(__file__).parents[2]), **SASL, **SECRETS},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert f"RuntimeError: connecting with {MASK}" in ended.stderr
    assert "hunter2" not in ended.stderr + ended.stdout


@pytest.mark.parametrize("style", ["logfmt", "console"])
def test_what_strangers_wrote_steers_no_terminal(style: logs.Style, capsys: pytest.CaptureFixture[str]) -> None:
    logs.to_stderr("info", style)
    structlog.get_logger().info("rejected", name="a\x1b[2Jb\rc\x9b1m")
    said = capsys.readouterr().err
    assert "x1b[2Jb" in said
    assert not set("\x1b\r\x9b") & set(said)


def as_incoming(emit: Emit, offset: int = 0) -> Incoming:
    return Incoming(emit.topic, "e", 0, offset, emit.key, emit.value, emit.headers)


async def test_the_id_of_an_event_finds_its_window_and_its_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    logs.to_stderr("info", "logfmt")
    fold = build_batch(DEFAULT, lambda _: None).open(3, "e1", [])
    fold.feed(on_log(0, seen(0, T0, box(0))))
    (batch,) = fold.feed(on_log(1, Tick(T0 + 40_000)))

    answers = iter(["no JSON", answer(71)])

    async def script(_messages: object) -> str:
        return next(answers)

    (context,) = await build_enrich(lambda _: None).handle(as_incoming(batch))
    await build_analyze(LlmSettings(), llm=FakeLlm(script)).handle(as_incoming(context))
    event = f"{read_batch(batch).batch_id}:live"
    story = [line for line in lines(capsys) if f"event={event}" in line]
    assert [line.split("msg=")[1].split(" event=")[0] for line in story] == ['"window closed"', "repair", "judged"]
    assert "camera=gate" in story[0]
    assert "frames=1 closed_by=tick" in story[0]
    assert "risk_level=high score=71 model=fake seconds=0.0" in story[2]


async def test_sixteen_idle_cameras_write_no_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    logs.to_stderr("info", "logfmt")
    detect = DetectStage(FakeDetector(), ClaimStore(str(tmp_path)), DetectorSettings(wait_ms=0))
    fold = build_batch(DEFAULT, lambda _: None).open(0, "e", [])
    for number in range(16):
        (emit,) = await detect.handle(as_incoming(codec.emit("frames", frame(jpeg(0)))))
        assert codec.decode(as_incoming(emit), Detections).boxes == ()
        fold.feed(as_incoming(emit, number))
    await detect.close()
    assert lines(capsys) == []


def test_a_fence_is_not_reported_twice() -> None:
    logs.to_stderr("info")
    logs.to_stderr("info")
    filters = logging.getLogger("asyncio").filters
    assert filters.count(logs._not_fenced) == 1


_LIBRARIES = """
import logging
from infra import logs

for level in ("info", "debug"):
    logs.to_stderr(level, "logfmt")
    for name in ("watchfiles.main", "faust", "infra.local.supervisor", "httpx"):
        logging.getLogger(name).info("%s says hello at %s", name, level)
        logging.getLogger(name).warning("%s complains at %s", name, level)
"""


def test_libraries_say_what_is_wrong_and_the_rest_only_to_debuggers() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _LIBRARIES], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    said = [line.split('msg="')[1].split('"')[0] for line in ended.stderr.splitlines()]
    hello = [line for line in said if "hello" in line]
    assert hello == [
        "infra.local.supervisor says hello at info",
        "watchfiles.main says hello at debug",
        "faust says hello at debug",
        "infra.local.supervisor says hello at debug",
    ], "never httpx: it tells addresses with passwords"
    assert len(said) - len(hello) == 8
