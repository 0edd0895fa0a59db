"""ClickHouse's HTTP protocol over the embedded engine (chDB): `python -m infra.local.clickhouse --path DIR --port N`.

One process holds the engine; clickhouse-connect's ordinary clients, curl and SQL tools talk to it as to a server.
Supported: GET and POST `/`, `/ping`; the query in the URL, the body, or both; multipart forms; `param_*`; settings
and `database`, `default_format` as URL parameters; request bodies in gzip, deflate, lz4, zstd or brotli. Not:
users and passwords (it listens on 127.0.0.1 alone and refuses browsers' cross-site requests), sessions (`SET` and
temporary tables last for one request), ClickHouse's own block compression, and external data.

Durability: every insert and every merge is fsynced (an insert before its answer), so on a disk that honours fsync
a power cut costs no acknowledged row. The engine's record of deduplication tokens is not known to be fsynced: after
a power cut a retried insert can appear twice until ReplacingMergeTree folds it, which `FINAL` does when it is read.
"""

import argparse
import asyncio
import json
import logging
import re
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import chdb
import cramjam
import httpx
import uvicorn
from filelock import FileLock, Timeout
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from infra.local.process import BEHIND, ProcessSpec, StartError, require_free_port
from streams.serving import bind, by_web_page

log = logging.getLogger(__name__)
T = TypeVar("T")

HOST = "127.0.0.1"

# More than the 20 concurrent queries a dashboard sends; each thread only waits for the engine's own threads.
WORKERS = 32
BODY_MAX_BYTES = 1024**3  # an insert larger than this is a mistake: the sink's are below 64 MB

# What one connection starts with; a request's URL parameters override them.
DEFAULT_SETTINGS: Mapping[str, str] = {
    "async_insert": "0",  # on by default since 26.x; an answered insert must be on disk
    # A result is held in memory before it is sent (unless it streams): refuse one that would fill the machine.
    "max_result_bytes": str(1024**3),
    "result_overflow_mode": "throw",
}

ENGINE_CONFIG = """<clickhouse>
  <merge_tree>
    <fsync_after_insert>1</fsync_after_insert>
    <fsync_part_directory>1</fsync_part_directory>
    <min_rows_to_fsync_after_merge>1</min_rows_to_fsync_after_merge>
  </merge_tree>
  <max_server_memory_usage_to_ram_ratio>0.5</max_server_memory_usage_to_ram_ratio>
  <mark_cache_size>268435456</mark_cache_size>
</clickhouse>
"""

# URL parameters of the protocol itself; every other one is a setting.
# https://clickhouse.com/docs/interfaces/http
PROTOCOL_PARAMETERS = frozenset(
    {
        "query",
        "database",
        "default_format",
        "user",
        "password",
        "query_id",
        "quota_key",
        "role",
        "session_id",
        "session_timeout",
        "session_check",
        "compress",
        "decompress",
        "buffer_size",
        "wait_end_of_query",
        "client_protocol_version",
        "close_session",
        "stacktrace",
        "send_progress_in_http_headers",
        "http_headers_progress_interval_ms",
        "enable_http_compression",
        "cancel_http_readonly_queries_on_client_close",
    }
)

DECODERS: Mapping[str, Callable[[bytes], Any]] = {
    "gzip": cramjam.gzip.decompress,
    "deflate": cramjam.zlib.decompress,
    "lz4": cramjam.lz4.decompress,
    "zstd": cramjam.zstd.decompress,
    "br": cramjam.brotli.decompress,
}

# Each block of these stands alone, so blocks can be sent as they come; the others have one header and one footer.
STREAMABLE = frozenset({"Native", "TabSeparated", "TSV", "CSV", "RowBinary", "JSONEachRow"})

_SPACE = rb"(?:\s|--[^\n]*(?:\n|$)|/\*.*?\*/)*"
_NAME = rb"(?:[\w.]|`(?:[^`\\]|\\.|``)*`|\"(?:[^\"\\]|\\.|\"\")*\")+"
# An INSERT whose rows follow as data: everything after FORMAT NAME and at most one line break.
_INSERT_DATA = re.compile(
    rb"(?is)" + _SPACE + rb"(?P<insert>INSERT\s+INTO\s+(?:TABLE\s+)?(?:FUNCTION\s+\w+\s*\(.*?\)|" + _NAME + rb")\s*"
    rb"(?:\((?:[^()`\"]|`(?:[^`\\]|\\.|``)*`|\"(?:[^\"\\]|\\.|\"\")*\"|\([^()]*\))*\)\s*)?"
    rb")(?P<settings>(?:SETTINGS\s+(?:'(?:[^'\\]|\\.)*'|[^'])*?)?)"
    rb"\bFORMAT\s+(?P<format>\w+)[ \t]*;?[ \t]*(?:\r?\n|$|(?=\S))"
)
_RETURNS_ROWS = re.compile(
    rb"(?is)(?:" + _SPACE + rb"\()*" + _SPACE + rb"(SELECT|WITH|SHOW|DESC|DESCRIBE|EXISTS|EXPLAIN|CHECK|VALUES|FROM)\b"
)
# Of these, chDB streams plain reads alone.
_STREAMS = re.compile(rb"(?is)(?:" + _SPACE + rb"\()*" + _SPACE + rb"(SELECT|WITH)\b")
_FORMAT_CLAUSE = re.compile(rb"(?is)\bFORMAT\s+(\w+)\s*(?:SETTINGS\s.*)?;?\s*$")
_PLAIN_NAME = re.compile(r"[A-Za-z_]\w*")


# chDB has neither users nor a folder that file functions are held to, and whoever has an account on this machine can
# ask it: a query must not read others' files (/proc/*/environ among them), nor call programs or other hosts. The text
# is searched as it is, literals too: telling them apart is what an attacker would play with.
_BETWEEN = rb"(?:\s|/\*.*?\*/|(?:--|\#)[^\n]*\n)*"
_OUTSIDE = re.compile(
    rb"\b(?:INFILE|OUTFILE)\b|(?:\b(?:file|fileCluster|filesystem|url|urlCluster|http|https|s3\w*|gcs|oss|cosn|"
    rb"azureBlobStorage\w*|hdfs\w*|iceberg\w*|deltaLake\w*|hudi\w*|paimon\w*|remote|remoteSecure|cluster\w*|distributed|"
    rb"mysql|postgresql|materializedPostgreSQL|mongodb|redis|sqlite|odbc|jdbc|ytsaurus|arrowFlight|executable\w*|python|"
    rb"kafka|nats|rabbitmq|clickhouse|disk|backup)|\\[^`\"\s]*(?=[`\"]))[`\"]?" + _BETWEEN + rb"\(",
    re.IGNORECASE | re.DOTALL,
)
# Behind this an insert's data begin, which may hold anything.
_INSERTED = re.compile(
    rb"(?is)\s*INSERT\s+INTO\s+(?:TABLE\s+)?[\w.`\"]+\s*(?:\([^()]*\)\s*)?(?:SETTINGS\s[^()\n]*?)?FORMAT\s+\w+"
)


class QueryError(Exception):
    """The engine refused a query; `code` is ClickHouse's error number."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        match = re.search(r"Code: (\d+)\.", message)
        self.code = int(match[1]) if match else 1002  # UNKNOWN_EXCEPTION

    @classmethod
    def of(cls, error: Exception) -> "QueryError":
        """From what chDB raises, without its own words before ClickHouse's."""
        text = str(error)
        return cls(text[max(text.find("Code: "), 0) :].strip())


@dataclass(frozen=True, slots=True)
class Query:
    """One request, understood.

    Attributes:
        text: The statement, with inline data where it has some.
        format: The output format unless the statement names one.
        database: The current database.
        params: Values of `{name:Type}` placeholders, escaped as ClickHouse's HTTP protocol has them.
        settings: Applied to this query alone.
        mark: Ours; the engine lists the query under it.
    """

    text: bytes
    format: str
    database: str
    params: Mapping[str, str]
    settings: Mapping[str, str]
    mark: str

    @property
    def returns_rows(self) -> bool:
        """Whether the statement has a result set, possibly an empty one."""
        return _RETURNS_ROWS.match(self.text) is not None

    @property
    def reaches_outside(self) -> bool:
        """Whether the statement names a function, engine or clause that leads to files, programs or other hosts."""
        data = _INSERTED.match(self.text)
        return _OUTSIDE.search(self.text[: data.end()] if data else self.text) is not None

    @property
    def streams(self) -> bool:
        """Whether the result can be sent block by block."""
        return _STREAMS.match(self.text) is not None and self.output_format in STREAMABLE

    @property
    def output_format(self) -> str:
        """The format of the result."""
        clause = _FORMAT_CLAUSE.search(self.text)
        return clause[1].decode() if clause else self.format


@dataclass(frozen=True, slots=True)
class Result:
    """What a finished query gave: the bytes, and ClickHouse's summary of the work."""

    body: bytes
    summary: Mapping[str, str]


class Stream:
    """A result fetched block by block; call `next` until it gives None, and `close` in any case."""

    def __init__(self, connection: Any, stream: Any, cancel: Callable[[], None]) -> None:
        self._connection = connection
        self._stream = stream
        self._cancel = cancel
        self._ended = False
        self._fetching = threading.Lock()  # a client can go while a thread still fetches

    def next(self) -> bytes | None:
        """The next block's bytes; None at the end. Raises QueryError."""
        with self._fetching:
            try:
                chunk = self._stream.fetch()
            except Exception as error:
                self._ended = True
                raise QueryError.of(error) from error
            self._ended = chunk is None
            return None if chunk is None else bytes(chunk.bytes())

    def close(self) -> None:
        """Cancel what still runs and give the connection back."""
        if not self._ended:
            self._cancel()
        with self._fetching:
            self._stream.close()
            self._connection.close()


class Engine:
    """The embedded engine on one directory, which it locks. Methods may be called from any thread.

    Every query has a connection of its own (0.1 ms), so that no setting, database or parameter of one reaches another.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path / "rewatch.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise StartError(
                f"Another process serves the ClickHouse data in {path}. Stop it, or set data_dir to another directory."
            ) from None
        config = path / "rewatch-config.xml"
        config.write_text(ENGINE_CONFIG)
        self._address = f"{path.resolve()}?config-file={config.resolve()}"
        self._keep = chdb.connect(self._address)  # the engine lives as long as one connection is open
        self.version = self._keep.query("SELECT version()", "TSV").bytes().decode().strip()
        self.timezone = self._keep.query("SELECT timezone()", "TSV").bytes().decode().strip()

    def run(self, query: Query) -> Result:
        """Run a query to its end. Raises QueryError."""
        connection = self._connect(query)
        try:
            insert = _INSERT_DATA.match(query.text)
            if insert is not None:
                return _insert(
                    connection,
                    insert["insert"].decode(),
                    f"{insert['settings'].decode()} FORMAT {insert['format'].decode()}",
                    query.text[insert.end() :],
                )
            answer = connection.query(query.text.decode(), query.format, params=dict(query.params))
            return Result(
                bytes(answer.bytes()),
                _summary(answer.elapsed(), read=(answer.storage_rows_read(), answer.storage_bytes_read())),
            )
        except Exception as error:
            raise QueryError.of(error) from error
        finally:
            connection.close()

    def stream(self, query: Query) -> Stream:
        """Begin a query whose result is fetched block by block. Raises QueryError."""
        connection = self._connect(query)
        try:
            stream = connection.send_query(query.text.decode(), query.format, params=dict(query.params))
            return Stream(connection, stream, lambda: self.cancel(query.mark))
        except Exception as error:
            connection.close()
            raise QueryError.of(error) from error

    def cancel(self, mark: str = "") -> None:
        """End the query under this mark; without one, every query."""
        which = f"Settings['log_comment'] = '{mark}'" if mark else "query NOT LIKE 'KILL QUERY%'"
        connection = chdb.connect(self._address)
        try:
            connection.query(f"KILL QUERY WHERE {which} ASYNC", "Null")
        finally:
            connection.close()

    def close(self) -> None:
        """End what runs, close the engine, free the directory."""
        self.cancel()
        self._keep.close()
        self._lock.release()

    def _connect(self, query: Query) -> Any:
        connection = chdb.connect(self._address)
        try:
            if query.database:
                connection.query(f"USE `{query.database.replace('`', '``')}`", "Null")
            settings = {**DEFAULT_SETTINGS, **query.settings, "log_comment": query.mark}
            # `SET param_x` reaches the paths that take no parameters (inserts) too.
            settings |= {f"param_{name}": value for name, value in query.params.items()}
            connection.query(
                "SET " + ", ".join(f"{name} = {_literal(value)}" for name, value in settings.items()), "Null"
            )
        except Exception as error:
            connection.close()
            raise QueryError.of(error) from error
        return connection


def _insert(connection: Any, target: str, clauses: str, data: bytes) -> Result:
    """Insert rows given as data; all of them or none reach the table when they fit one block (about 1 M rows).

    They go by way of a file. chDB's streaming insert answers "done" when the table refused the rows: disk full, too
    many parts, a violated constraint. And inline data ends where the parser takes it for the next statement.
    """
    with tempfile.NamedTemporaryFile(prefix="rewatch-insert-") as file:
        file.write(data)
        file.flush()
        done = connection.query(f"{target} FROM INFILE {_literal(file.name)} COMPRESSION 'none' {clauses}", "Null")
        return Result(b"", _summary(done.elapsed(), written=(done.rows_read(), done.bytes_read())))


def _literal(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _summary(elapsed: float, *, read: tuple[int, int] = (0, 0), written: tuple[int, int] = (0, 0)) -> dict[str, str]:
    """The values of X-ClickHouse-Summary, which are strings."""
    rows_bytes = {"read_rows": read[0], "read_bytes": read[1], "written_rows": written[0], "written_bytes": written[1]}
    return {name: str(value) for name, value in rows_bytes.items()} | {"elapsed_ns": str(int(elapsed * 1e9))}


class Server:
    """The ASGI application over an engine, and the threads its queries wait in."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._engine: Engine | None = None
        self._threads = ThreadPoolExecutor(WORKERS, "query")
        self.app = Starlette(
            routes=[
                Route("/ping", _ping, methods=["GET", "HEAD"]),
                Route("/", self._handle, methods=["GET", "HEAD", "POST"]),
            ],
            lifespan=self._lifespan,
        )

    @property
    def engine(self) -> Engine:
        """The open engine."""
        assert self._engine is not None, "the application has not started"
        return self._engine

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._engine = await self._in_thread(lambda: Engine(self._path))
        try:
            yield
        finally:
            await self._in_thread(self._engine.close)
            self._threads.shutdown()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _handle(self, request: Request) -> Response:
        # A web page that someone visits must not reach the store through their browser.
        if by_web_page(request.headers):
            raise HTTPException(403, "requests by web pages are refused")
        query = await _understand(request)
        if query is None:
            return PlainTextResponse("Ok.\n")
        query_id = request.query_params.get("query_id") or query.mark
        headers = {
            "X-ClickHouse-Query-Id": query_id,
            "X-ClickHouse-Server-Display-Name": "rewatch",
            "X-ClickHouse-Timezone": self.engine.timezone,
        }
        if query.returns_rows:
            headers["X-ClickHouse-Format"] = query.output_format
        try:
            if query.reaches_outside:
                raise QueryError(
                    "Code: 497. DB::Exception: the embedded ClickHouse reads and writes its own tables only: no files, "
                    "programs or other hosts. (ACCESS_DENIED)"
                )
            wait = request.query_params.get("wait_end_of_query", "0") not in {"0", "false"}
            if query.streams and not wait:
                return await self._stream(query, headers, request)
            result = await self._unless_gone(lambda: self.engine.run(query), query, request)
        except QueryError as error:
            return PlainTextResponse(
                f"{error} (version {self.engine.version})\n",
                500,
                {**headers, "X-ClickHouse-Exception-Code": str(error.code)},
            )
        headers["X-ClickHouse-Summary"] = json.dumps(result.summary)
        media_type = _media_type(query.output_format) if query.returns_rows else None
        return Response(result.body, headers=headers, media_type=media_type)

    async def _unless_gone(self, work: Callable[[], T], query: Query, request: Request) -> T:
        """Do work on a query in a thread; end a read whose client has gone, as nobody waits for it."""
        doing = asyncio.ensure_future(self._in_thread(work))
        gone = asyncio.ensure_future(request.receive())  # the body is read: what comes next is the disconnection
        try:
            await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not doing.done() and query.returns_rows:
                await self._in_thread(lambda: self.engine.cancel(query.mark))
            return await doing
        finally:
            gone.cancel()

    async def _stream(self, query: Query, headers: Mapping[str, str], request: Request) -> Response:
        """Answer with blocks as they come; the first is awaited, so that most errors still get their status."""
        stream = await self._in_thread(lambda: self.engine.stream(query))
        try:
            first = await self._unless_gone(stream.next, query, request)
        except BaseException:
            await self._in_thread(stream.close)
            raise

        async def blocks() -> AsyncIterator[bytes]:
            block = first
            try:
                while block is not None:
                    yield block
                    # An error here breaks the connection off: the client sees a cut answer, never a short one.
                    block = await self._in_thread(stream.next)
            finally:
                await asyncio.shield(self._in_thread(stream.close))

        return StreamingResponse(blocks(), headers=dict(headers), media_type=_media_type(query.output_format))


async def _ping(_: Request) -> Response:
    return PlainTextResponse("Ok.\n")


async def _understand(request: Request) -> Query | None:
    """The query of a request; None when it has none."""
    values = dict(request.query_params)
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        body = b""
        for name, value in (await request.form(max_part_size=BODY_MAX_BYTES)).items():
            if isinstance(value, UploadFile):
                raise HTTPException(501, "external data is not supported by the embedded ClickHouse")
            values[name] = value
    else:
        body = await _body(request)
    if values.get("decompress", "0") != "0" or values.get("compress", "0") != "0":
        raise HTTPException(501, "ClickHouse block compression is not supported here: use Content-Encoding")
    text = b"\n".join(part for part in (values.get("query", "").encode(), body) if part)
    if not text.strip():
        return None
    settings = {n: v for n, v in values.items() if n not in PROTOCOL_PARAMETERS and not n.startswith("param_")}
    for name in settings:
        if not _PLAIN_NAME.fullmatch(name):
            raise HTTPException(400, f"{name!r} is not the name of a setting")
    params = {n.removeprefix("param_"): v for n, v in values.items() if n.startswith("param_")}
    if request.method != "POST":
        settings["readonly"] = "2"  # as the server has it: only POST may change anything
    return Query(
        text=text,
        format=request.headers.get("x-clickhouse-format") or values.get("default_format") or "TabSeparated",
        database=request.headers.get("x-clickhouse-database") or values.get("database") or "default",
        params=params,
        settings=settings,
        mark=str(uuid.uuid4()),
    )


async def _body(request: Request) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > BODY_MAX_BYTES:
            raise HTTPException(413, f"a request's body is limited to {BODY_MAX_BYTES} bytes")
        chunks.append(chunk)
    body = b"".join(chunks)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding == "identity" or not body:
        return body
    if encoding not in DECODERS:
        raise HTTPException(501, f"Content-Encoding {encoding} is not supported; known: {', '.join(DECODERS)}")
    try:
        return bytes(await asyncio.to_thread(DECODERS[encoding], body))
    except cramjam.DecompressionError as error:
        raise HTTPException(400, f"the body is not {encoding}: {error}") from error


def _media_type(name: str) -> str:
    if name.startswith("JSON"):
        return "application/x-ndjson" if name.endswith("EachRow") else "application/json"
    return (
        "text/plain; charset=UTF-8"
        if name.startswith(("T", "CSV", "Pretty", "Vertical"))
        else "application/octet-stream"
    )


def spec(path: Path, port: int, *, setting_name: str = "local.clickhouse_port") -> ProcessSpec:
    """The server as a supervisor's child."""

    async def prepare() -> None:
        require_free_port(HOST, port, what="The embedded ClickHouse", setting=setting_name)

    async def ready() -> bool:
        try:
            async with httpx.AsyncClient(trust_env=False) as client:
                return (await client.get(f"http://{HOST}:{port}/ping", timeout=2.0)).status_code == 200
        except httpx.HTTPError:
            return False

    return ProcessSpec(
        name="clickhouse",
        argv=[sys.executable, "-m", "infra.local.clickhouse", "--path", str(path), "--port", str(port)],
        prepare=prepare,
        ready=ready,
        port=port,
        nice=BEHIND,  # the sink keeps it busy
        stop_timeout=15.0,
    )


def main() -> None:
    """Serve until SIGTERM or SIGINT; running queries have 5 s to end."""
    parser = argparse.ArgumentParser(prog="python -m infra.local.clickhouse", description=__doc__)
    parser.add_argument("--path", type=Path, required=True, help="the directory of the data")
    parser.add_argument("--port", type=int, default=8123)
    arguments = parser.parse_args()
    try:
        require_free_port(HOST, arguments.port, what="The embedded ClickHouse", setting="--port")
        listener = bind(HOST, arguments.port)
        config = uvicorn.Config(
            Server(arguments.path).app,
            log_level="warning",
            timeout_graceful_shutdown=5,
            h11_max_incomplete_event_size=1024 * 1024,  # the query may stand in the URL
        )
        # After its orderly stop uvicorn raises the signal once more; that must not look like a crash.
        signal.signal(signal.SIGTERM, lambda *_: None)
        uvicorn.Server(config).run(sockets=[listener])
    except StartError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
