"""ClickHouse's HTTP protocol over the embedded engine, through the ordinary clients."""

import asyncio
import gzip
import os
import signal
import subprocess
import sys
import time
import zlib
from collections import deque

import clickhouse_connect
import cramjam
import httpx
import pytest
from anyio.from_thread import start_blocking_portal
from clickhouse_connect.driver.exceptions import DatabaseError, OperationalError

from infra.local import clickhouse
from infra.local.process import Process, free_port

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("clickhouse")


@pytest.fixture(scope="module")
def port(directory):
    number = free_port()
    process = Process(clickhouse.spec(directory / "data", number), directory)
    with start_blocking_portal() as portal:
        portal.call(process.start)
        try:
            yield number
        finally:
            portal.call(process.stop)


@pytest.fixture
def url(port):
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def client(port):
    with clickhouse_connect.get_client(host="127.0.0.1", port=port) as made:
        yield made


@pytest.fixture
def table(client, request):
    name = f"t_{abs(hash(request.node.name))}"
    client.command(
        f"CREATE TABLE {name} (a UInt64, b String) ENGINE = MergeTree ORDER BY a "
        "SETTINGS non_replicated_deduplication_window = 100"
    )
    yield name
    client.command(f"DROP TABLE {name}")


def post(url, body=b"", headers=None, **params):
    return httpx.post(url, params=params, content=body, headers=headers, timeout=30)


def test_root_and_ping_say_ok(url):
    assert [httpx.get(f"{url}{path}").text for path in ("/", "/ping")] == ["Ok.\n", "Ok.\n"]


def test_query_in_the_url_in_the_body_and_in_both(url):
    assert httpx.get(url, params={"query": "SELECT 1"}).text == "1\n"
    assert post(url, b"SELECT 2").text == "2\n"
    assert post(url, b", 4", query="SELECT 3").text == "3\t4\n"


def test_curl(url, table):
    def curl(*arguments):
        return subprocess.run(["curl", "-sS", *arguments], check=True, capture_output=True, text=True).stdout

    assert curl(url, "--data-binary", f"INSERT INTO {table} FORMAT CSV\n1,x\n2,y\n") == ""
    assert curl(f"{url}/?query=SELECT+count()+FROM+{table}") == "2\n"


def test_formats_by_clause_parameter_and_header(url):
    assert post(url, b"SELECT 1 AS x FORMAT JSONEachRow").json() == {"x": 1}
    assert post(url, b"SELECT 1 AS x", default_format="JSONEachRow").json() == {"x": 1}
    answer = post(url, b"SELECT 1 AS x", headers={"X-ClickHouse-Format": "JSON"})
    assert answer.json()["data"] == [{"x": 1}]
    assert (answer.headers["x-clickhouse-format"], answer.headers["content-type"]) == ("JSON", "application/json")


@pytest.mark.parametrize("value", ["it's", "tab\there", "line\nbreak", "back\\slash", "{x}", "ü", ""])
def test_parameters_keep_every_character(client, value):
    assert client.query("SELECT {v:String}", parameters={"v": value}).result_rows == [(value,)]


def test_array_parameter(client):
    assert client.query("SELECT {v:Array(String)}", parameters={"v": ["a'b", "c"]}).result_rows == [(["a'b", "c"],)]


def test_parameters_too_long_for_a_url_come_as_a_form(client):
    value = "x" * 200_000
    assert client.query("SELECT length({v:String})", parameters={"v": value}).result_rows == [(200_000,)]


def test_parameters_in_an_insert(client, table):
    client.command(f"INSERT INTO {table} SELECT {{a:UInt64}}, {{b:String}}", parameters={"a": 7, "b": "q'"})
    client.command(f"INSERT INTO {table} VALUES ({{a:UInt64}}, 'x')", parameters={"a": 8})
    assert client.query(f"SELECT * FROM {table} ORDER BY a").result_rows == [(7, "q'"), (8, "x")]


def test_settings_and_database_last_for_one_request(url):
    assert post(url, b"SELECT getSetting('max_threads')", max_threads="3").text == "3\n"
    assert post(url, b"SELECT getSetting('max_threads')").text != "3\n"
    assert post(url, b"SELECT currentDatabase()", database="system").text == "system\n"
    assert post(url, b"SELECT currentDatabase()").text == "default\n"


def test_errors_carry_the_number_and_the_text(url, client):
    answer = post(url, b"SELECT * FROM nothing_here")
    assert (answer.status_code, answer.headers["x-clickhouse-exception-code"]) == (500, "60")
    assert answer.text.startswith("Code: 60. DB::Exception: ")
    assert "UNKNOWN_TABLE" in answer.text
    with pytest.raises(DatabaseError, match="UNKNOWN_TABLE") as caught:
        client.query("SELECT * FROM nothing_here")
    assert caught.value.code == 60
    assert post(url, b"SELEC 1").headers["x-clickhouse-exception-code"] == "62"
    assert post(url, b"SELECT 1", no_such_setting="1").headers["x-clickhouse-exception-code"] == "115"
    assert post(url, b"SELECT 1", database="nowhere").headers["x-clickhouse-exception-code"] == "81"


def test_a_setting_name_cannot_smuggle_sql(url):
    assert httpx.post(f"{url}/?max_threads%3D1,readonly=1", content=b"SELECT 1").status_code == 400


def test_get_may_not_change_anything(url, table):
    answer = httpx.get(url, params={"query": f"DROP TABLE {table}"})
    assert answer.headers["x-clickhouse-exception-code"] == "164"


def test_a_web_page_is_refused(url):
    assert post(url, b"SELECT 1", headers={"Origin": "http://elsewhere.example"}).status_code == 403


def test_commands_without_a_result_name_no_format(client, table):
    assert client.command(f"EXISTS {table}") == 1
    summary = client.command(f"OPTIMIZE TABLE {table}")
    assert summary.written_rows == 0


def test_empty_result(client, table):
    assert client.query(f"SELECT a FROM {table}").result_rows == []
    assert client.query(f"SELECT a, b FROM {table} LIMIT 0").column_names == ("a", "b")


@pytest.mark.parametrize("compress", [False, "lz4", "zstd", "gzip"])
def test_insert_by_the_client_in_every_encoding(port, table, compress):
    with clickhouse_connect.get_client(host="127.0.0.1", port=port, compress=compress) as client:
        rows = [(i, f"row {i}\n\t\\") for i in range(5000)]
        summary = client.insert(table, rows, column_names=["a", "b"])
        assert summary.written_rows == 5000
        assert client.query(f"SELECT a, b FROM {table} ORDER BY a").result_rows == rows


@pytest.mark.parametrize(
    ("encoding", "encode"),
    [
        ("gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("lz4", cramjam.lz4.compress),
        ("zstd", cramjam.zstd.compress),
        ("br", cramjam.brotli.compress),
    ],
)
def test_content_encoding_covers_the_statement_too(url, table, encoding, encode):
    body = bytes(encode(f"INSERT INTO {table} FORMAT TSV\n1\tx\n".encode()))
    answer = post(url, body, {"Content-Encoding": encoding})
    assert (answer.status_code, post(url, f"SELECT * FROM {table}".encode()).text) == (200, "1\tx\n")
    assert post(url, b"not compressed", {"Content-Encoding": encoding}).status_code == 400


def test_statement_in_the_url_and_rows_in_the_body(url, table):
    # Native data may begin with any byte, also with one that looks like space: 32 columns, 10 rows.
    assert post(url, b"1\tx\n", query=f"INSERT INTO {table} FORMAT TSV").status_code == 200
    assert (
        post(url, b'{"a": 2, "b": "FORMAT TSV"}', query=f"INSERT INTO {table} (a, `b`) FORMAT JSONEachRow").status_code
        == 200
    )
    assert (
        post(
            url, b"", query=f"INSERT INTO {table} (a, b) SETTINGS max_threads = 1 VALUES (3, 'x FORMAT y')"
        ).status_code
        == 200
    )
    assert (
        post(
            url, f"/* note */ INSERT INTO {table} (a) SETTINGS log_comment = 'FORMAT CSV' FORMAT TSV\n4\n".encode()
        ).status_code
        == 200
    )
    assert post(url, f"SELECT a FROM {table} ORDER BY a".encode()).text == "1\n2\n3\n4\n"


def test_native_insert_of_32_columns(client):
    names = [f"c{i}" for i in range(32)]
    client.command(f"CREATE TABLE wide ({', '.join(f'{n} UInt8' for n in names)}) ENGINE = Memory")
    client.insert("wide", [[1] * 32] * 10, column_names=names)
    assert client.command("SELECT sum(c31) FROM wide") == 10
    client.command("DROP TABLE wide")


def test_the_same_deduplication_token_counts_once(client, table):
    for _ in range(2):
        client.insert(table, [(1, "x"), (2, "y")], settings={"insert_deduplication_token": "v1:lo-hi"})
    client.insert(table, [(1, "x"), (2, "y")], settings={"insert_deduplication_token": "v1:next"})
    assert client.command(f"SELECT count() FROM {table}") == 4


def test_a_bad_row_leaves_nothing(url, table):
    answer = post(url, f"INSERT INTO {table} FORMAT TSV\n1\tx\nnot a number\ty\n".encode())
    assert answer.headers["x-clickhouse-exception-code"] in {"27", "72"}
    assert post(url, f"SELECT count() FROM {table}".encode()).text == "0\n"


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM file('/proc/self/environ', 'LineAsString')",
        "SELECT file('/etc/passwd')",
        "SELECT * FROM `file` /* x */ ('/etc/passwd')",
        "SELECT * FROM FILE -- x\n('/etc/passwd')",
        "SELECT * FROM `fi\\x6ce`('/etc/passwd')",
        "SELECT $a$'$a$, file('/etc/passwd')",
        "SELECT * FROM url('http://127.0.0.1:1/', 'LineAsString')",
        "CREATE TABLE t (x String) ENGINE = File(LineAsString, '/etc/passwd')",
        "CREATE TABLE t (x String) ENGINE = Executable('id', TSV)",
        "INSERT INTO FUNCTION file('/tmp/x', 'TSV') SELECT 1",
        "INSERT INTO t FROM INFILE '/etc/passwd' FORMAT LineAsString",
        "SELECT 1 INTO OUTFILE '/tmp/x'",
    ],
)
def test_no_query_reaches_files_programs_or_other_hosts(url, query):
    answer = post(url, query.encode())
    assert (answer.status_code, answer.headers["x-clickhouse-exception-code"]) == (500, "497")


def test_what_is_inserted_may_hold_any_text(url, table):
    assert post(url, f"INSERT INTO {table} FORMAT TSV\n7\tfile('/etc/passwd')\n".encode()).status_code == 200
    assert "file(" in post(url, f"SELECT * FROM {table} WHERE 1".encode()).text


async def test_twenty_concurrent_queries(port):
    client = await clickhouse_connect.get_async_client(host="127.0.0.1", port=port, autogenerate_session_id=False)
    async with client:
        answers = await asyncio.gather(
            *(client.query("SELECT {i:UInt32}, sleep(0.3)", parameters={"i": i}) for i in range(20))
        )
    assert [answer.result_rows[0][0] for answer in answers] == list(range(20))


async def test_a_long_query_does_not_block_ping(url):
    async with httpx.AsyncClient(timeout=30) as client:
        busy = "SELECT count() FROM numbers(100000000000) WHERE sipHash64(number) = 1"
        # wait_end_of_query: as clickhouse-connect's ordinary queries.
        long = asyncio.create_task(
            client.post(url, content=busy, params={"max_execution_time": "1", "wait_end_of_query": "1"})
        )
        await asyncio.sleep(0.2)
        began = time.monotonic()
        assert (await client.get(f"{url}/ping")).text == "Ok.\n"
        assert time.monotonic() - began < 0.5
        assert (await long).headers["x-clickhouse-exception-code"] == "159"


async def running(client, url, mark):
    query = f"SELECT count() FROM system.processes WHERE query LIKE '%{mark} %' AND query NOT LIKE '%processes%'"
    return int((await client.post(url, content=query)).text)


async def until(condition):
    deadline = time.monotonic() + 20
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("wait", ["0", "1"])
async def test_a_query_ends_when_its_client_goes(url, wait):
    async with httpx.AsyncClient(timeout=30) as client:
        busy = f"SELECT sum(sipHash64(number)) AS marker_{wait} FROM numbers(100000000000)"
        task = asyncio.create_task(client.post(url, content=busy, params={"wait_end_of_query": wait}))

        async def runs():
            return await running(client, url, f"marker_{wait}")

        async def runs_no_more():
            return not await runs()

        await until(runs)
        task.cancel()
        await until(runs_no_more)


async def test_a_stream_ends_when_its_client_goes(url):
    async with httpx.AsyncClient(timeout=30) as client:
        async with client.stream("POST", url, content="SELECT number AS marker_s FROM numbers(100000000000)") as answer:
            await anext(answer.aiter_bytes())
            assert await running(client, url, "marker_s") == 1

        async def runs_no_more():
            return not await running(client, url, "marker_s")

        await until(runs_no_more)


def test_a_large_result_streams(client):
    with client.query_row_block_stream("SELECT number FROM numbers(3000000)") as stream:
        assert sum(len(block) for block in stream) == 3_000_000


def test_an_error_inside_a_stream_is_not_a_short_answer(client):
    query = "SELECT throwIf(number = 2000000) FROM numbers(3000000) SETTINGS max_block_size = 65536"
    with client.query_row_block_stream(query) as stream, pytest.raises((DatabaseError, OperationalError)):
        deque(stream, maxlen=0)


def test_a_result_above_the_cap_is_refused(url):
    answer = post(url, b"SELECT number FROM numbers(10000000) FORMAT JSON", max_result_bytes="1000000")
    assert answer.headers["x-clickhouse-exception-code"] == "396"


async def test_data_survive_a_stop_and_a_kill(tmp_path):
    number = free_port()
    where = f"http://127.0.0.1:{number}"
    process = Process(clickhouse.spec(tmp_path / "data", number), tmp_path)
    await process.start()
    create = (
        b"CREATE TABLE kept (a UInt64) ENGINE = MergeTree ORDER BY a SETTINGS non_replicated_deduplication_window = 9"
    )
    assert post(where, create).status_code == 200
    insert = {"query": "INSERT INTO kept FORMAT TSV", "insert_deduplication_token": "one"}
    post(where, b"1\n", **insert)
    await process.stop()
    assert process.returncode == 0
    await process.start()
    post(where, b"1\n", **insert)  # the token is remembered across the stop
    post(where, b"2\n", query="INSERT INTO kept FORMAT TSV")
    os.kill(process.pid, signal.SIGKILL)
    await process.wait()
    await process.start()
    assert post(where, b"SELECT a FROM kept ORDER BY a").text == "1\n2\n"
    await process.stop()


async def test_sigterm_with_a_query_running_ends_in_order(tmp_path):
    number = free_port()
    process = Process(clickhouse.spec(tmp_path / "data", number), tmp_path)
    await process.start()
    async with httpx.AsyncClient(timeout=30) as client:
        busy = "SELECT count() FROM numbers(100000000000) WHERE sipHash64(number) = 1"
        task = asyncio.create_task(
            client.post(f"http://127.0.0.1:{number}", content=busy, params={"wait_end_of_query": "1"})
        )
        await asyncio.sleep(0.3)
        began = time.monotonic()
        await process.stop()
        assert process.returncode == 0
        assert time.monotonic() - began < 10
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.usefixtures("port")
def test_a_second_process_on_the_same_data_is_refused(directory):
    second = subprocess.run(
        [sys.executable, "-m", "infra.local.clickhouse", "--path", str(directory / "data"), "--port", str(free_port())],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert second.returncode != 0
    assert "Another process serves the ClickHouse data" in second.stderr


def test_a_taken_port_is_named(port, tmp_path):
    second = subprocess.run(
        [sys.executable, "-m", "infra.local.clickhouse", "--path", str(tmp_path), "--port", str(port)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert second.returncode == 1
    assert f"127.0.0.1:{port}" in second.stderr
    assert "--port" in second.stderr


@pytest.mark.parametrize("tail", ["", " VALUES (1)", " (a, b", " SETTINGS x = 'FORMAT", " SELECT 1 FORMAT"])
def test_a_statement_is_understood_in_linear_time(tail):
    statement = b"INSERT INTO " + b"long_name." * 5000 + b"x" + tail.encode() + b" " * 5000 + b"?"
    began = time.monotonic()
    assert clickhouse._INSERT_DATA.match(statement) is None
    assert time.monotonic() - began < 1
