"""The supervisor, on small Python children: order, restarts, giving up, stalls, locks, and no orphans."""

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from infra.local import process, supervisor
from infra.local.process import BEHIND, PortTakenError, Process, ProcessSpec, StartError, require_free_port
from infra.local.supervisor import AlreadyRunningError, ProcessFailedError, Supervisor, read_state

SLEEP = [sys.executable, "-ISc", "import time; time.sleep(600)"]


@pytest.fixture(autouse=True)
def _quick_backoff(monkeypatch):
    monkeypatch.setattr(supervisor, "BACKOFF_FIRST_SECONDS", 0.01)


def python(code):
    return [sys.executable, "-ISc", code]


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def marks(path):
    return path.read_text().split() if path.exists() else []


def writes(path, word):
    """A child that notes its start and its orderly end."""
    return python(
        "import signal, sys, time\n"
        f"note = lambda word: open({str(path)!r}, 'a').write(word + ' ')\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (note('{word}-'), sys.exit()))\n"
        f"note('{word}+')\n"
        "time.sleep(600)\n"
    )


async def test_starts_what_is_needed_first_and_stops_in_reverse(tmp_path):
    notes = tmp_path / "notes"

    def noted(word):
        async def ready():
            return f"{word}+" in marks(notes)

        return ready

    specs = [
        ProcessSpec("log", writes(notes, "log"), ready=noted("log")),
        ProcessSpec("store", writes(notes, "store"), ready=noted("store"), needs=("log",)),
        ProcessSpec("stage", writes(notes, "stage"), ready=noted("stage"), needs=("log", "store")),
    ]
    async with Supervisor(tmp_path, specs):
        assert marks(notes) == ["log+", "store+", "stage+"]
    assert marks(notes)[3:] == ["stage-", "store-", "log-"]


async def test_what_needs_nothing_starts_side_by_side(tmp_path):
    notes = tmp_path / "notes"

    async def both():
        return {"a+", "b+"} <= set(marks(notes))

    async with Supervisor(tmp_path, [ProcessSpec(n, writes(notes, n), ready=both) for n in "ab"]):
        pass


async def test_a_killed_child_comes_back(tmp_path):
    async with Supervisor(tmp_path, [ProcessSpec("child", SLEEP)]) as running:
        before = running.pid("child")
        os.kill(before, signal.SIGKILL)
        await until(lambda: running.pid("child") not in {None, before})
        await until(lambda: running.state()["processes"]["child"]["state"] == "ready")
        assert running.state()["processes"]["child"]["restarts"] == 1


async def test_a_child_that_keeps_dying_is_given_up_with_its_last_words(tmp_path):
    flag = tmp_path / "flag"
    code = f"import os, time\nif os.path.exists({str(flag)!r}): raise SystemExit('no luck today')\ntime.sleep(600)"
    async with Supervisor(tmp_path, [ProcessSpec("child", python(code))], max_restarts=3) as running:
        flag.touch()
        os.kill(running.pid("child"), signal.SIGKILL)
        with pytest.raises(ProcessFailedError, match=r"(?s)child failed 4 times.*no luck today"):
            await asyncio.wait_for(running.wait(), 20)
        assert running.state()["processes"]["child"]["state"] == "failed"
        flag.unlink()
        await running.restart("child")
        assert running.pid("child")


async def test_a_full_disk_ends_no_supervision_and_the_state_is_written_later(tmp_path, monkeypatch):
    full = []

    def bounded(write):
        def writing(path, *args, **named):
            if full:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return write(path, *args, **named)

        return writing

    monkeypatch.setattr(Path, "write_text", bounded(Path.write_text))
    monkeypatch.setattr(Path, "write_bytes", bounded(Path.write_bytes))
    monkeypatch.setattr(process, "LOG_MAX_BYTES", 0)
    async with Supervisor(tmp_path, [ProcessSpec("child", SLEEP)], watch=0.02) as running:
        before = running.pid("child")
        full.append(1)
        os.kill(before, signal.SIGKILL)
        await until(lambda: running.pid("child") not in {None, before})
        await until(lambda: running.state()["processes"]["child"]["state"] == "ready")
        assert read_state(tmp_path)["processes"]["child"]["pid"] == before
        full.clear()
        await until(lambda: read_state(tmp_path)["processes"]["child"]["pid"] == running.pid("child"))


async def test_a_supervision_that_breaks_off_is_said_and_ends_all(tmp_path, monkeypatch, caplog):
    async def broken(_):
        await asyncio.sleep(0.01)
        raise ValueError("a fault of our own")

    monkeypatch.setattr(Process, "wait", broken)
    async with Supervisor(tmp_path, [ProcessSpec("child", SLEEP)]) as running:
        with pytest.raises(ProcessFailedError, match=r"child is supervised no more: .*a fault of our own"):
            await asyncio.wait_for(running.wait(), 5)
        assert running.state()["processes"]["child"]["state"] == "failed"
    assert "child: its supervision broke off" in caplog.text


async def test_a_child_that_never_starts_fails_the_start_and_leaves_nothing(tmp_path):
    specs = [ProcessSpec("good", SLEEP), ProcessSpec("bad", python("raise SystemExit('wrong setting')"), ready=never)]
    running = Supervisor(tmp_path, specs)
    with pytest.raises(StartError, match=r"(?s)bad ended with code 1 before it was ready.*wrong setting"):
        await running.start()
    assert running.pid("good") is None
    assert read_state(tmp_path) is None
    async with Supervisor(tmp_path, [ProcessSpec("good", SLEEP)]):  # the directory is free again
        pass


async def never():
    return False


async def test_a_child_that_is_never_ready_is_stopped(tmp_path):
    running = Supervisor(tmp_path, [ProcessSpec("child", SLEEP, ready=never, ready_timeout=0.2)])
    with pytest.raises(StartError, match=r"not ready within 0\.2 s"):
        await running.start()
    assert running.pid("child") is None


async def test_restart_on_request_is_no_failure(tmp_path):
    async with Supervisor(tmp_path, [ProcessSpec("child", SLEEP)], max_restarts=0) as running:
        before = running.pid("child")
        await running.restart("child")
        assert running.pid("child") not in {None, before}


async def test_a_child_runs_as_nice_as_its_description_says(tmp_path):
    async with Supervisor(tmp_path, [ProcessSpec("child", SLEEP, nice=BEHIND)]) as running:
        child = psutil.Process(running.pid("child"))
        await until(lambda: child.nice() == os.nice(0) + BEHIND)


async def test_a_stalled_child_is_restarted(tmp_path):
    stalled = []

    async def answer():
        return stalled.pop() if stalled else None

    async with Supervisor(tmp_path, [ProcessSpec("child", SLEEP, stalled=answer)], watch=0.02) as running:
        before = running.pid("child")
        stalled.append("position 5 for 60 s")
        await until(lambda: running.pid("child") not in {None, before})


async def test_a_stalled_child_is_not_waited_for_as_one_that_is_asked_to_stop(tmp_path, monkeypatch):
    monkeypatch.setattr("infra.local.supervisor.STALLED_STOP_SECONDS", 0.1)
    notes = tmp_path / "notes"
    deaf = python(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(notes)!r}, 'a').write('up '); time.sleep(600)"
    )
    stalled = []

    async def answer():
        return stalled.pop() if stalled else None

    spec = ProcessSpec("child", deaf, stalled=answer, stop_timeout=600)
    async with asyncio.timeout(60), Supervisor(tmp_path, [spec], watch=0.02) as running:
        before = running.pid("child")
        await until(lambda: marks(notes) == ["up"])
        stalled.append("position 5 for 60 s")
        await until(lambda: marks(notes) == ["up", "up"])
        assert running.pid("child") not in {None, before}
        os.kill(running.pid("child"), signal.SIGKILL)


async def test_a_stopped_child_is_woken_to_end_in_order(tmp_path):
    notes = tmp_path / "notes"
    child = python(
        "import signal, sys, time\n"
        f"def end(*_): open({str(notes)!r}, 'a').write(' ended'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"open({str(notes)!r}, 'a').write('up')\n"
        "while True: time.sleep(0.05)"
    )

    async def up():
        return marks(notes) == ["up"]

    running = Supervisor(tmp_path, [ProcessSpec("child", child, ready=up, stop_timeout=60)])
    await running.start()
    os.kill(running.pid("child"), signal.SIGSTOP)
    await running.stop()
    assert marks(notes) == ["up", "ended"]


async def test_a_watchdog_that_cannot_tell_restarts_nothing(tmp_path):
    asked = []

    async def answer():
        asked.append(1)
        raise OSError("no answer")

    async with Supervisor(tmp_path, [ProcessSpec("child", SLEEP, stalled=answer)], watch=0.02) as running:
        before = running.pid("child")
        await until(lambda: len(asked) > 3)
        assert running.pid("child") == before


async def test_a_child_deaf_to_sigterm_is_killed(tmp_path):
    notes = tmp_path / "notes"
    deaf = python(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(notes)!r}, 'a').write('up'); time.sleep(600)"
    )

    async def up():
        return marks(notes) == ["up"]

    running = Supervisor(tmp_path, [ProcessSpec("child", deaf, ready=up, stop_timeout=0.2)])
    await running.start()
    pid = running.pid("child")
    await running.stop()
    assert not psutil.pid_exists(pid)


async def test_grandchildren_end_with_their_parent(tmp_path):
    notes = tmp_path / "notes"
    code = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen({SLEEP!r})\n"
        f"open({str(notes)!r}, 'w').write(str(p.pid)); time.sleep(600)"
    )

    async def up():
        return bool(marks(notes))

    async with Supervisor(tmp_path, [ProcessSpec("child", python(code), ready=up)]):
        grandchild = int(marks(notes)[0])
    await until(lambda: gone(grandchild))


async def test_a_second_start_finds_the_first(tmp_path):
    async with Supervisor(tmp_path, [ProcessSpec("child", SLEEP, port=4242)]) as running:
        state = read_state(tmp_path)
        assert state["pid"] == os.getpid()
        assert state["processes"]["child"] | {"pid": running.pid("child"), "port": 4242} == state["processes"]["child"]
        with pytest.raises(AlreadyRunningError, match="set data_dir") as caught:
            await Supervisor(tmp_path).start()
        assert caught.value.state == state
    assert read_state(tmp_path) is None


def test_a_state_file_of_a_dead_supervisor_counts_as_nothing(tmp_path):
    entry = {"pid": os.getpid(), "create_time": 1.0}  # the id lives, but it is another process now
    (tmp_path / "run.json").write_text(json.dumps(entry))
    assert read_state(tmp_path) is None


SUPERVISE = """
import asyncio, sys
from pathlib import Path
from infra.local.process import ProcessSpec
from infra.local.supervisor import Supervisor
where = Path(sys.argv[1])
async def ready():
    return sys.argv[2] == "at once" or (where / "up").exists()
async def main():
    code = f"open({str(where / 'up')!r}, 'w'); import time; time.sleep(600)"
    async with Supervisor(where, [ProcessSpec("child", [sys.executable, "-ISc", code], ready=ready)]) as s:
        print(s.pid("child"), flush=True)
        await s.wait()
asyncio.run(main())
"""


def gone(pid):
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
@pytest.mark.parametrize("when", ["at once", "when it runs"])  # at once: the kernel has not been told yet
async def test_no_orphans_after_the_supervisor_is_killed(tmp_path, when):
    killed = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SUPERVISE, str(tmp_path), when), stdout=asyncio.subprocess.PIPE
    )
    child = int(await killed.stdout.readline())
    killed.kill()
    await killed.wait()
    await until(lambda: gone(child))
    async with Supervisor(tmp_path, [ProcessSpec("child", SLEEP)]):  # the lock died with it
        pass


async def test_leftovers_of_a_dead_supervisor_are_ended_at_the_next_start(tmp_path):
    # Not a child of asyncio's: the supervisor waits for its end too, and only one of the two would learn of it.
    orphan = subprocess.Popen(SLEEP)
    entry = {"pid": orphan.pid, "create_time": psutil.Process(orphan.pid).create_time()}
    dead = {"pid": 2**22, "create_time": 1.0, "processes": {"child": entry}}
    (tmp_path / "run.json").write_text(json.dumps(dead))
    async with Supervisor(tmp_path):
        assert gone(orphan.pid)
    orphan.wait()  # nothing is left to wait for, but Popen must be told


async def test_the_log_keeps_what_the_child_printed_and_stays_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "LOG_MAX_BYTES", 1000)
    child = Process(ProcessSpec("child", python("print('x' * 5000)")), tmp_path)
    for _ in range(3):
        await child.start()
        assert await child.wait() == 0
    assert "x" * 5000 in child.log_tail()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["child.log", "child.log.1"]
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 11_000


def test_a_name_twice_and_an_unknown_need_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two processes"):
        Supervisor(tmp_path, [ProcessSpec("a", SLEEP), ProcessSpec("a", SLEEP)])
    with pytest.raises(ValueError, match="listed before"):
        Supervisor(tmp_path, [ProcessSpec("a", SLEEP, needs=("b",)), ProcessSpec("b", SLEEP)])


def test_a_taken_port_names_the_setting(unused_tcp_port_held):
    with pytest.raises(PortTakenError, match=r"set local\.kafka_port to a free port"):
        require_free_port("127.0.0.1", unused_tcp_port_held, what="Kafka", setting="local.kafka_port")


@pytest.fixture
def unused_tcp_port_held():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as held:
        yield held.getsockname()[1]


async def test_ready_in_milliseconds(tmp_path):
    began = time.monotonic()
    async with Supervisor(tmp_path, [ProcessSpec("child", SLEEP)]):
        assert time.monotonic() - began < 2
