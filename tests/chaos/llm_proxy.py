"""An HTTP proxy before the llama-server that answers badly when told to, and remembers whom it answered so."""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any, Literal

import httpx

Manner = Literal["errors", "hangs", "garbage", "cut-off"]

_CHAT = "/v1/chat/completions"
# Longer than any deadline that a campaign sets.
_UPSTREAM_S = 300.0


def question(messages: Sequence[dict[str, Any]]) -> str:
    """What is asked: the first two messages, system and user; a repair comes behind them."""
    return json.dumps([{"role": m["role"], "content": m["content"]} for m in messages[:2]], ensure_ascii=False)


class LlmProxy:
    """Forwards to `port`, in the manner that is set. `cameras`: the names that tell windows from canaries."""

    def __init__(self, port: int, cameras: Collection[str]) -> None:
        self._upstream = f"http://127.0.0.1:{port}"
        self._cameras = tuple(cameras)
        self.port = 0
        self.manner: Manner | None = None
        self.poisoning = 0
        """How many windows that come next are to be refused from then on."""
        self.poisoned: set[str] = set()
        """Questions that are always answered 500."""
        self.spoiled: Counter[str] = Counter()
        """How often each question was answered badly."""
        self.misbehaved = 0
        """How often the manner that was set spoiled an answer."""
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["LlmProxy"]:
        async with httpx.AsyncClient(base_url=self._upstream, timeout=_UPSTREAM_S, trust_env=False) as client:

            async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                task = asyncio.current_task()
                assert task is not None
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                try:
                    with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                        await self._serve(client, reader, writer)
                finally:
                    writer.close()

            server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=1 << 20)
            self.port = server.sockets[0].getsockname()[1]
            try:
                yield self
            finally:
                server.close()
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(
        self, client: httpx.AsyncClient, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """One request a connection."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        method, path, _ = head.split(" ", 2)
        fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
        body = await reader.readexactly(int(fields.get("content-length", "0")))
        asked = question(json.loads(body)["messages"]) if path == _CHAT else ""
        manner = self._manner(asked)
        if asked and manner is not None:
            self.spoiled[asked] += 1
            self.misbehaved += asked not in self.poisoned
        elif manner in {"errors", "hangs"}:  # who is asked what it is misbehaves as well, and may be asked no more then
            self.misbehaved += 1
        if manner == "errors":
            await _answer(writer, 500, b'{"error": {"message": "chaos"}}')
        elif manner == "hangs":
            await reader.read()  # until the client gives up
        elif manner == "garbage" and asked:
            await _answer(writer, 200, b'{"choices": [{"message": "chaos"')
        else:
            cut = manner == "cut-off" and bool(asked)
            forwarding = asyncio.create_task(self._forward(client, writer, method, path, body, cut=cut))
            gone = asyncio.create_task(reader.read())
            try:  # a client that hangs up frees the server's slot, as it does without a proxy
                await asyncio.wait({forwarding, gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (forwarding, gone):
                    task.cancel()
                await asyncio.gather(forwarding, gone, return_exceptions=True)

    def _manner(self, asked: str) -> Manner | None:
        is_window = any(camera in asked for camera in self._cameras)
        if self.poisoning and is_window and asked not in self.poisoned:
            self.poisoning -= 1
            self.poisoned.add(asked)
        return "errors" if asked in self.poisoned else self.manner

    async def _forward(
        self, client: httpx.AsyncClient, writer: asyncio.StreamWriter, method: str, path: str, body: bytes, *, cut: bool
    ) -> None:
        kind = {"content-type": "application/json"} if body else {}
        try:
            answer = await client.request(method, path, content=body, headers=kind)
        except httpx.ConnectError:
            await _answer(writer, 503, b'{"error": {"message": "the server is away"}}')
            return
        except httpx.HTTPError:  # it broke off in the middle: so does this
            writer.transport.abort()
            return
        await _answer(writer, answer.status_code, answer.content, upto=len(answer.content) // 2 if cut else None)


async def _answer(writer: asyncio.StreamWriter, status: int, body: bytes, *, upto: int | None = None) -> None:
    head = f"HTTP/1.1 {status} .\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close"
    writer.write(head.encode() + b"\r\n\r\n" + body[:upto])
    await writer.drain()
