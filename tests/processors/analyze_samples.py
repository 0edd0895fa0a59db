"""Windows, answers and a server without manners, for the tests of analyze."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from schemas import ids
from schemas.records import Batch, BatchFrame, Context, ContextSection, SeenBox

EVENING = 1_790_370_840_000
"""2026-09-25 23:14 in Berlin."""


def seen(label, score=0.9, *, x=100.0, y=100.0, width=60.0, height=160.0, stationary=False):
    return SeenBox(label=label, score=score, x=x, y=y, width=width, height=height, stationary=stationary)


def context(
    *frames: tuple[SeenBox, ...],
    camera="front-door",
    started_at=EVENING,
    seconds=34.0,
    zone="Europe/Berlin",
    sections: tuple[ContextSection, ...] = (),
    size=(640, 360),
) -> Context:
    """A window of one camera, its frames' boxes as given."""
    frames = frames or ((seen("person"),),)
    shown = tuple(
        BatchFrame(
            frame_id=f"{camera}:{index}",
            offset=index,
            event_at=started_at + index,
            width=size[0],
            height=size[1],
            matters=True,
            late=False,
            boxes=boxes,
        )
        for index, boxes in enumerate(frames)
    )
    batch = Batch(
        batch_id=ids.batch_id(camera, [frame.frame_id for frame in shown]),
        camera_id=camera,
        started_at=started_at,
        ended_at=started_at + round(seconds * 1000),
        frames=shown,
        closed_by="idle",
        closed_at_offset=99,
        partition=3,
        epoch="e",
        settings_digest="s",
    )
    return Context(
        batch_id=batch.batch_id,
        camera_id=camera,
        batch=batch,
        camera_name=camera,
        time_zone=zone,
        sections=sections,
    )


def section(name, text, priority=0):
    return ContextSection(name=name, text=text, priority=priority, made_by="test")


def answer(score: object = 71, **other: object) -> str:
    return json.dumps(
        {
            "reasoning": "person 30, night +25 = 55, loitering +16 = 71",
            "risk_factors": ["night", "loitering"],
            "entities": ["1 person"],
            "summary": "1 person at front-door by night for 34 s",
            "recommended_action": "notify",
            "risk_score": score,
            **other,
        }
    )


def completion(text: str, finish_reason: str = "stop") -> dict[str, Any]:
    """A chat completion as llama.cpp's server writes it."""
    return {
        "choices": [
            {"finish_reason": finish_reason, "index": 0, "message": {"role": "assistant", "content": text}},
        ],
        "model": "rude",
        "system_fingerprint": "b1",
        "usage": {"completion_tokens": 5, "prompt_tokens": 60, "prompt_tokens_details": {"cached_tokens": 40}},
        "timings": {"cache_n": 40},
    }


class Die(Exception):  # noqa: N818 (an order, not an error)
    """Close the connection without a word."""


Reply = tuple[int, Any]
Script = Callable[[str, Any], Awaitable[Reply]]
"""The path and the body of a request; status and body (bytes, or what becomes JSON)."""


class RudeServer:
    """An OpenAI-compatible server that does what `chat` says, on a port of its own."""

    def __init__(self, chat: Callable[[dict[str, Any]], Awaitable[Reply]]) -> None:
        self.chat = chat
        self.requests: list[tuple[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.hung_up = asyncio.Event()
        self.pages: dict[str, Reply] = {
            "/v1/models": (200, {"data": [{"id": "rude-1"}]}),
            "/props": (
                200,
                {
                    "total_slots": 2,
                    "build_info": "b1-rude",
                    "model_path": "/models/rude.gguf",
                    "default_generation_settings": {"n_ctx": 2048},
                },
            ),
        }

    @property
    def judged(self) -> list[dict[str, Any]]:
        return [body for path, body in self.requests if path == "/v1/chat/completions"]

    @asynccontextmanager
    async def running(self, port: int = 0) -> AsyncIterator[str]:
        tasks: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._serve(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_server(accept, "127.0.0.1", port)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for task in tuple(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, Die):
                while True:
                    await self._one(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        path = head[0].split()[1]
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:] if line)}
        self.headers.append(headers)
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        body = json.loads(raw) if raw else None
        self.requests.append((path, body))
        replying = asyncio.ensure_future(self._reply(path, body))
        gone = asyncio.ensure_future(reader.read(1))  # a client that hangs up frees the slot
        await asyncio.wait({replying, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not replying.done():
            self.hung_up.set()
            replying.cancel()
            raise Die
        gone.cancel()
        await asyncio.wait({gone})
        status, content = replying.result()
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(data)) + data)
        await writer.drain()

    async def _reply(self, path: str, body: Any) -> Reply:
        if path == "/v1/chat/completions":
            return await self.chat(body)
        return self.pages.get(path, (404, {"error": {"message": "no such page"}}))


async def hang(*_: object) -> Any:
    await asyncio.Event().wait()
