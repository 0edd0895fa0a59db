"""Models from a hub that breaks off, lies, serves wrong bytes: nothing wrong is kept, nothing right fetched twice."""

import asyncio
import json
import logging
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from infra.config import load
from infra.models import download as download_module
from infra.models import hub as hub_module
from infra.models import library
from infra.models.catalogue import CATALOGUE, UnknownModelError, lookup
from infra.models.download import DownloadError, Promise, WrongFileError, download
from processors.detect.settings import ModelError
from tests.infra.cli_kit import answer, invoke
from tests.infra.fake_hub import COMMIT, Hub

DETECTOR = CATALOGUE["rtdetr_v2_r18vd"]
LLM = CATALOGUE["nemotron-mini-4b"]
GGUF = "Nemotron-Mini-4B-Instruct-Q4_K_M.gguf"
WEIGHTS = bytes(range(256)) * 4096
"""1 MiB."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with two models, where HF_ENDPOINT says; the home directory is empty."""
    made = Hub(
        {
            DETECTOR.repo: {
                "config.json": b'{"model_type": "rt_detr_v2"}',
                "preprocessor_config.json": b"{}",
                "model.safetensors": WEIGHTS,
                "README.md": b"not wanted",
            },
            LLM.repo: {GGUF: WEIGHTS[::-1], "Nemotron-Mini-4B-Instruct-Q5_K_M.gguf": WEIGHTS[1:]},
        }
    )
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(made.app, log_config=None, lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(download_module.random, "uniform", lambda *_: 0.0)  # no pauses
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it reports each answer that breaks off
    monkeypatch.chdir(tmp_path)
    yield made
    server.should_exit = True
    thread.join()
    listener.close()


def test_a_detector_comes_whole_with_what_was_published_beside_it(hub: Hub, tmp_path: Path) -> None:
    found = hub_module.pull(DETECTOR, tmp_path)
    assert found.path == tmp_path / DETECTOR.name
    names = {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert {p.name for p in found.path.iterdir()} == {*names, library.MANIFEST}
    assert found.manifest is not None
    assert (found.manifest.revision, set(found.manifest.files)) == (COMMIT, names)
    assert library.verify(found.path, found.manifest) == []


def test_what_is_there_and_right_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    hub_module.pull(DETECTOR, tmp_path)
    (tmp_path / DETECTOR.name / "config.json").write_text("spoilt")
    hub.asked.clear()
    hub_module.pull(DETECTOR, tmp_path)
    assert hub.asked == [None]
    assert (tmp_path / DETECTOR.name / "config.json").read_bytes().startswith(b'{"model')


def test_a_line_that_breaks_off_is_gone_on_with_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    hub.break_off = [300_000, 1, 500_000]
    found = hub_module.pull(LLM, tmp_path)
    assert found.path.read_bytes() == WEIGHTS[::-1]
    starts = [int((asked or "bytes=0-").removeprefix("bytes=").removesuffix("-")) for asked in hub.asked]
    assert starts == sorted(starts)
    assert starts[0] == 0 < starts[1] < starts[3]
    assert len(starts) == 4


def test_a_later_run_goes_on_where_an_earlier_one_gave_up(hub: Hub, tmp_path: Path) -> None:
    hub.break_off = [400_000] + [0] * 5
    with pytest.raises(DownloadError, match="are kept: run it again"):
        hub_module.pull(LLM, tmp_path)
    assert not (tmp_path / LLM.name / GGUF).exists()
    [part] = (tmp_path / LLM.name).glob("*.part")
    kept = part.stat().st_size
    assert kept > 0
    hub.asked.clear()
    assert hub_module.pull(LLM, tmp_path).path.read_bytes() == WEIGHTS[::-1]
    assert hub.asked == [f"bytes={kept}-"]


def test_a_server_without_ranges_is_asked_from_the_start(hub: Hub, tmp_path: Path) -> None:
    hub.ranges = False
    hub.break_off = [300_000]
    assert hub_module.pull(LLM, tmp_path).path.read_bytes() == WEIGHTS[::-1]


def test_a_busy_hub_is_waited_for(hub: Hub, tmp_path: Path) -> None:
    hub.busy = 3
    assert hub_module.pull(LLM, tmp_path).path.exists()


@pytest.mark.parametrize("lie", [-1, 1])
def test_a_hub_that_lies_about_the_size_leaves_nothing(hub: Hub, tmp_path: Path, lie: int) -> None:
    hub.lie = lie
    with pytest.raises(DownloadError):
        hub_module.pull(LLM, tmp_path)
    assert not (tmp_path / LLM.name / GGUF).exists()


def test_wrong_bytes_are_refused_and_not_kept(hub: Hub, tmp_path: Path) -> None:
    hub.spoil = True
    with pytest.raises(WrongFileError, match="It was not kept"):
        hub_module.pull(LLM, tmp_path)
    assert [p.name for p in (tmp_path / LLM.name).iterdir() if not p.name.endswith(".lock")] == []


def test_a_wrong_small_file_is_refused_too(hub: Hub, tmp_path: Path) -> None:
    good = hub.repos[DETECTOR.repo]["config.json"]
    promise = Promise(len(good), "git-sha1", "0" * 40)
    with httpx.Client() as client, pytest.raises(WrongFileError):
        download(client, f"{hub_module.address()}/{DETECTOR.repo}/resolve/main/config.json", tmp_path / "c", promise)


def test_another_quantisation_can_be_had_and_one_that_is_not_there_is_named(hub: Hub, tmp_path: Path) -> None:
    assert hub_module.pull(LLM, tmp_path, quant="Q5_K_M").path.name.endswith("Q5_K_M.gguf")
    with pytest.raises(DownloadError, match=r"0 files like \*-Q2_K\.gguf; it has .*Q5_K_M"):
        hub_module.pull(LLM, tmp_path, quant="Q2_K")


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))  # type: ignore[attr-defined]
    with pytest.raises(DownloadError, match="10 free"):
        hub_module.pull(LLM, tmp_path)
    assert hub.asked == []


def test_the_token_goes_to_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub_module.pull(LLM, tmp_path)
    assert hub.tokens == ["Bearer hf_secret"]


def test_a_hub_that_is_away_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(DownloadError, match="HF_ENDPOINT"):
        hub_module.pull(LLM, tmp_path)


def test_commands_pull_verify_use_and_list(hub: Hub, tmp_path: Path) -> None:
    Path("rewatch.yaml").write_text("# my cameras\ntime_zone: Europe/Berlin  # home\n")
    result = invoke("models", "pull", LLM.name)
    assert result.exit_code == 0, result.output
    assert f"rewatch models use {LLM.name}" in result.output
    path = load().data_dir.resolve() / "models" / LLM.name / GGUF
    assert answer("models", "verify") == [
        {"name": "demo", "ok": True, "problems": []},
        {"name": LLM.name, "ok": True, "problems": []},
    ]
    Path("rewatch.yaml").rename("site.yaml")
    Path("site.yaml").chmod(0o640)
    Path("rewatch.yaml").symlink_to("site.yaml")
    answer("models", "use", LLM.name)
    assert Path("rewatch.yaml").is_symlink()
    assert Path("site.yaml").stat().st_mode & 0o777 == 0o640, "it may hold passwords"
    assert Path("rewatch.yaml").read_text().startswith("# my cameras\ntime_zone: Europe/Berlin  # home\n")
    assert (load().llm.model_path, load().llm.context_size, load().time_zone) == (str(path), 4096, "Europe/Berlin")
    rows = {(row["name"], row["kind"]): row for row in answer("models", "ls")}
    assert rows[LLM.name, "llm"]["in_use"]
    assert not rows["demo", "llm"]["in_use"]
    assert rows["demo", "detector"]["in_use"]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    [_, wrong] = answer("models", "verify", code=1)
    assert "is not the file that was published" in wrong["problems"][0]
    answer("models", "use", "demo")
    assert load().llm.model_path == "demo"


def test_a_folder_that_was_carried_here_is_verified_and_used(hub: Hub, tmp_path: Path) -> None:
    stick = tmp_path / "stick"
    assert invoke("models", "pull", DETECTOR.name, "--to", str(stick)).exit_code == 0
    hub.repos.clear()  # no line from here on
    assert answer("models", "verify", str(stick / DETECTOR.name))[0]["ok"]
    answer("models", "use", DETECTOR.name, "--path", str(stick / DETECTOR.name))
    assert load().detector.model_path == str((stick / DETECTOR.name).resolve())


def test_a_name_of_the_catalogue_in_the_settings_means_the_model_where_it_lies(hub: Hub, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with pytest.raises(ModelError, match=f"rewatch models pull {LLM.name}"):
        library.resolve(LLM.name, "llm", data)
    shared = Path.home() / "models"
    shared.mkdir(parents=True)
    (shared / GGUF).write_bytes(b"as another program left it")
    assert library.resolve(LLM.name, "llm", data) == str(shared / GGUF)
    hub_module.pull(LLM, data / "models")
    assert library.resolve(LLM.name, "llm", data) == str(data / "models" / LLM.name / GGUF)
    assert library.resolve("someone/else", "detector", data) == "someone/else"
    assert library.resolve(DETECTOR.repo, "detector", data) == DETECTOR.repo


def test_one_changed_byte_of_the_shipped_weights_fails(tmp_path: Path) -> None:
    copy = tmp_path / "weights"
    shutil.copytree(library.DEMO, copy)
    assert library.verify_demo(copy) == []
    weights = copy / "analyst.gguf"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    [wrong] = library.verify_demo(copy)
    assert "analyst.gguf" in wrong


def test_a_misspelt_model_is_told_what_is_near() -> None:
    with pytest.raises(UnknownModelError, match="did you mean nemotron-mini-4b"):
        lookup("nemotron-mini4b")
    assert invoke("models", "pull", "nemotron-mini4b").exit_code == 2


def test_two_pulls_at_once_are_one(hub: Hub, tmp_path: Path) -> None:
    del hub
    folder = tmp_path / LLM.name
    folder.mkdir()
    seen: list[str] = []
    promise = hub_module.published(LLM).files[GGUF]
    lock = download_module.FileLock(folder / f".{GGUF}.{promise.digest[:16]}.lock")
    with lock:
        try:
            hub_module.pull(LLM, tmp_path)
        except DownloadError as error:
            seen.append(str(error))
    assert "another process" in seen[0]


def test_answers_of_json_are_json(hub: Hub) -> None:
    result = invoke("models", "pull", LLM.name, "--json")
    assert json.loads(result.stdout)["name"] == LLM.name
