"""The broker's jars: a torn one is fetched again."""

import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from infra.local import broker


def test_a_jar_torn_by_a_kill_in_the_middle_of_its_download_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    repository, cache = tmp_path / ".m2" / "a", tmp_path / "cache"
    repository.mkdir(parents=True)
    cache.mkdir()
    updates: list[bool] = []

    def build(_: str, *, update: bool) -> SimpleNamespace:
        """As jgo: what is in the local repository is taken for whole, and linked into the cache."""
        updates.append(update)
        for name in ("whole.jar", "torn.jar"):
            if not (repository / name).exists():
                with zipfile.ZipFile(repository / name, "w") as jar:
                    jar.writestr("Main.class", "x" * 100)
            if not (cache / name).exists():
                (cache / name).hardlink_to(repository / name)
        return SimpleNamespace(all_jars=[cache / "whole.jar", cache / "torn.jar"])

    monkeypatch.setattr(broker.jgo, "build", build)
    (repository / "torn.jar").write_bytes(b"PK\x03\x04 and no more")
    jars = [Path(jar) for jar in broker._jars().split(":")]
    assert [jar.name for jar in jars] == ["whole.jar", "torn.jar"]
    assert all(zipfile.is_zipfile(jar) for jar in jars)
    assert updates == [False, True]
    broker._jars()
    assert updates == [False, True, False]
