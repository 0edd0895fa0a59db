"""The real broker, the LLM server, and all three together."""

import asyncio
import os
import signal
import socket
import stat
import sys
import time
from contextlib import suppress
from dataclasses import replace

import httpx
import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from infra.local import llama
from infra.local.broker import Broker
from infra.local.llama import LlamaSettings
from infra.local.process import PortTakenError, Process, StartError, free_port
from infra.local.stack import LocalStack
from infra.local.supervisor import AlreadyRunningError, read_state
from tests.infra.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.real


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


async def make_topic(bootstrap, name):
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, 1, 1)])
    finally:
        await admin.close()


async def append(bootstrap, topic, *values):
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, transactional_id="test", max_request_size=4_000_000)
    async with producer, producer.transaction():
        for value in values:
            await producer.send_and_wait(topic, value, partition=0)


async def read_all(bootstrap, topic, count):
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap, isolation_level="read_committed", auto_offset_reset="earliest"
    )
    async with consumer, asyncio.timeout(20):
        consumer.assign([TopicPartition(topic, 0)])
        return [(await consumer.getone()).value for _ in range(count)]


async def test_the_broker_keeps_records_over_a_stop_and_a_kill(tmp_path):
    broker = Broker(tmp_path, 0)
    await broker.start()
    try:
        await make_topic(broker.bootstrap_servers, "t")
        await append(broker.bootstrap_servers, "t", b"1", b"x" * 3_000_000)
        await broker.stop()
        assert broker.pid is None
        await broker.start()
        await append(broker.bootstrap_servers, "t", b"3")
        os.kill(broker.pid, signal.SIGKILL)
        await broker.stop()
        await broker.start()
        assert await read_all(broker.bootstrap_servers, "t", 3) == [b"1", b"x" * 3_000_000, b"3"]
        second = Broker(tmp_path, 0)
        with pytest.raises(StartError, match="Another broker owns"):
            await second.start()
    finally:
        await broker.stop()


async def test_a_taken_kafka_port_names_the_setting(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        with pytest.raises(PortTakenError, match=rf"127\.0\.0\.1:{port}.*set local\.kafka_port"):
            await Broker(tmp_path, port).start()


@pytest.fixture
async def serve(tmp_path, model):
    running = []

    async def start(**settings):
        chosen = LlamaSettings(model, free_port(), **settings)
        process = Process(llama.spec(chosen), tmp_path)
        running.append(process)
        await process.start()
        return chosen, process

    yield start
    for process in running:
        await process.stop()


def get(url, **headers):
    return httpx.get(url, headers=headers, timeout=30)


def sql(stack, statement):
    return httpx.post(stack.clickhouse_url, content=statement, timeout=30)


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.02)


def complete(url, prompt, **headers):
    return httpx.post(f"{url}/completion", json={"prompt": prompt, "n_predict": 8}, headers=headers, timeout=30).json()


async def test_llama_serves_its_slots_metrics_and_name(serve, model):
    settings, process = await serve(ctx=2048, parallel=2)
    assert [slot["n_ctx"] for slot in get(f"{settings.url}/slots").json()] == [1024, 1024]
    assert complete(settings.url, "who is there")["tokens_predicted"] <= 8
    assert get(f"{settings.url}/v1/models").json()["data"][0]["id"] == model.stem
    assert "llamacpp" in get(f"{settings.url}/metrics").text
    await process.stop()
    assert process.returncode == 0


async def test_one_slot_no_cache_and_a_seed_repeat_a_completion(serve):
    settings, _ = await serve(parallel=1, prompt_cache=False, seed=7, threads=1, api_key="secret")
    assert get(f"{settings.url}/v1/models").status_code == 401
    prompt = "a person at the door " * 10
    first, second = (complete(settings.url, prompt, Authorization="Bearer secret") for _ in range(2))
    assert first["generation_settings"]["seed"] == 7
    assert first["content"] == second["content"]
    assert second["timings"]["cache_n"] == 0


async def test_the_prompt_cache_reuses_a_prefix(serve):
    settings, _ = await serve(parallel=1)
    prompt = "a person at the door " * 10
    complete(settings.url, prompt)
    assert complete(settings.url, prompt)["timings"]["cache_n"] > 100


async def test_the_api_key_is_not_on_the_command_line(serve):
    _, process = await serve(api_key="secret")
    assert "secret" not in " ".join(psutil.Process(process.pid).cmdline())


async def test_an_own_llama_server_gets_the_same_settings(tmp_path, model):
    binary = tmp_path / "llama-server"
    binary.write_text('#!/bin/sh\necho "key $LLAMA_API_KEY args $*"\n')
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    settings = LlamaSettings(
        model, 4711, ctx=512, parallel=1, threads=3, prompt_cache=False, seed=5, api_key="k", server_path=binary
    )
    process = Process(replace(llama.spec(settings), prepare=None, ready=None), tmp_path)
    await process.start()
    assert await process.wait() == 0
    said = process.log_tail()
    assert "key k args" in said
    flags = (
        "--port 4711",
        "--ctx-size 512",
        "--parallel 1",
        "--threads 3",
        "--poll 0",
        "--seed 5",
        "--no-cache-prompt",
    )
    for flag in flags:
        assert flag in said


def test_one_core_is_left_to_others_where_nobody_says_how_many_threads(monkeypatch):
    for usable, physical, threads in ((1, 1, 1), (2, 2, 1), (4, 8, 3), (16, 8, 7), (3, None, 2)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, usable=usable: range(usable))
        monkeypatch.setattr("psutil.cpu_count", lambda logical, physical=physical: physical)
        assert llama.threads_of(0) == threads
        assert llama.threads_of(5) == 5


async def test_a_missing_model_names_the_setting(tmp_path):
    with pytest.raises(StartError, match="NEMOTRON_MODEL_PATH"):
        await Process(llama.spec(LlamaSettings(tmp_path / "none.gguf", free_port())), tmp_path).start()


def stack_on(path, model):
    return LocalStack(path, kafka_port=0, clickhouse_port=0, llama=LlamaSettings(model, port=0))


async def test_the_stack_starts_restarts_a_killed_broker_and_keeps_its_data(tmp_path, model):
    async with stack_on(tmp_path, model) as stack:
        await make_topic(stack.bootstrap_servers, "t")
        await append(stack.bootstrap_servers, "t", b"1")
        create = "CREATE TABLE kept ENGINE = MergeTree ORDER BY a AS SELECT 1 AS a"
        assert sql(stack, create).status_code == 200
        assert get(f"{stack.llm_url}/health").status_code == 200
        with pytest.raises(AlreadyRunningError):
            await stack_on(tmp_path, model).start()
        before = stack.supervisor.pid("kafka")
        os.kill(before, signal.SIGKILL)

        def back():
            entry = read_state(tmp_path)["processes"]["kafka"]
            return (entry["state"], entry["restarts"]) == ("ready", 1)

        await until(back)
        await append(stack.bootstrap_servers, "t", b"2")
        pids = [stack.supervisor.pid(name) for name in ("kafka", "clickhouse", "llama")]
    assert not any(psutil.pid_exists(pid) for pid in pids)

    began = time.monotonic()
    async with stack_on(tmp_path, model) as stack:  # other ports, the same data
        print(f"warm start {time.monotonic() - began:.1f} s")
        assert await read_all(stack.bootstrap_servers, "t", 2) == [b"1", b"2"]
        assert sql(stack, "SELECT a FROM kept").text == "1\n"


def gone(pid):
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


STACK = """
import asyncio, sys
from pathlib import Path
from infra.local.llama import LlamaSettings
from infra.local.stack import LocalStack
async def main():
    llama = LlamaSettings(Path(sys.argv[2]), port=0)
    async with LocalStack(Path(sys.argv[1]), kafka_port=0, clickhouse_port=0, llama=llama) as stack:
        print("up", flush=True)
        await stack.supervisor.wait()
asyncio.run(main())
"""


@pytest.mark.chaos
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
async def test_nothing_outlives_a_killed_stack(tmp_path, model):
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", STACK, str(tmp_path), str(model), stdout=asyncio.subprocess.PIPE
    )
    assert await asyncio.wait_for(owner.stdout.readline(), 60) == b"up\n"
    pids = [entry["pid"] for entry in read_state(tmp_path)["processes"].values()]
    assert len(pids) == 3
    owner.kill()
    await owner.wait()
    await until(lambda: all(gone(pid) for pid in pids))
    assert read_state(tmp_path) is None
