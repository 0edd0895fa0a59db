"""The JSON API: what the pages show, for programs. Described at `/api/openapi.json`."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Header, HTTPException, Path, Query, Request, Response
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema
from starlette.responses import StreamingResponse

from processors.gateway.models import (
    CameraCard,
    CameraId,
    EventDetail,
    EventList,
    EventSummary,
    Health,
    Label,
    Level,
    Moment,
    NewLabel,
    Timeline,
)
from processors.gateway.ports import InvalidError, Source
from processors.gateway.upload import Uploads

# Proxies close a connection on which nothing came for a minute, some for half of one.
HEARTBEAT_S = 15.0
_RETRY_MS = 2000
# Each is a connection and a queue of at most 256 KB.
_STREAMS = 200

_YEAR_S = 31_536_000


class Error(BaseModel):
    """Why not, and what would help."""

    error: str


class Taken(BaseModel):
    """What became of an upload."""

    frame_id: str
    status: str = Field(description="`accepted`, or `known` where this frame was there already.")


class Serving(BaseModel):
    """The process serves."""

    status: str = "ok"


_WHY = {
    400: "What was sent cannot be read.",
    401: "No API key and no token that is taken: `Authorization: Bearer KEY` or `X-API-Key: KEY`.",
    403: "The token lacks the scope that the message names; or sent by a page of another site, or to a name that is "
    "not this gateway's.",
    404: "There is no such thing; the message says what is near.",
    408: "The body did not arrive in time.",
    413: "The body is too long.",
    422: "A value cannot be used; the message names it and says what would be right.",
    429: "Too many at once, or too many wrong keys: `Retry-After` says when to come back.",
    503: "What this needs is away; the message names it and the fix, `Retry-After` when to come back.",
}
_RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "string"}}}

Responses = dict[int | str, dict[str, Any]]


def errors(*statuses: int) -> Responses:
    """How these errors are described; everything can answer 401, 403 and 429."""
    return {
        status: {
            "model": Error,
            "description": _WHY[status],
            **({"headers": _RETRY} if status in {429, 503} else {}),
        }
        for status in sorted({401, 403, 429, *statuses})
    }


EventId = Annotated[
    str, Path(min_length=1, max_length=300, description="An event's id, or a beginning of it that only one has.")
]
When = Annotated[
    Moment | SkipJsonSchema[None], Query(description="ISO 8601; without an offset it is UTC, without a time midnight.")
]


def routes(source: Source, uploads: Uploads) -> APIRouter:
    """The API over a source."""
    api = APIRouter(redirect_slashes=False)
    _add_events(api, source, _Streams(source))
    _add_cameras(api, source)
    _add_doors(api, source, uploads)
    return api


def _add_events(api: APIRouter, source: Source, streams: "_Streams") -> None:
    """Events: pages of them, as they come, and one whole."""

    @api.get("/api/events", responses=errors(422, 503))
    async def events(  # noqa: PLR0917 (FastAPI makes parameters of them)
        camera: Annotated[CameraId | None, Query(description="Of this camera only.")] = None,
        level: Annotated[Level | None, Query(description="Of this level, or above.")] = None,
        since: When = None,
        until: When = None,
        before: Annotated[str | None, Query(max_length=1000, description="`next` of the page before.")] = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
    ) -> EventList:
        """Live events, newest first, a page at a time."""
        return await source.events(camera=camera, level=level, since=since, until=until, before=before, limit=limit)

    @api.get(
        "/api/events/stream",
        response_class=StreamingResponse,
        responses={
            200: {
                "description": "Server-sent events named `event`: `data` is an EventSummary, `id` a cursor. A client "
                "that resumes with its last `id` misses nothing.",
                "content": {"text/event-stream": {"schema": {"type": "string"}}},
            },
            **errors(422, 503),
        },
    )
    async def stream(
        request: Request,
        after: Annotated[str | None, Query(max_length=8000, description="Resume behind this cursor.")] = None,
        last_event_id: Annotated[str | None, Header(description="As `after`; browsers send it by themselves.")] = None,
    ) -> Response:
        """Events as they come into ClickHouse."""
        # Who came with a token stays no longer than it holds.
        until = request.scope.get("state", {}).get("until", math.inf)
        return streams.open(after, last_event_id, until=until)

    @api.get("/api/events/{event_id:path}", responses=errors(404, 422, 503))
    async def event(event_id: EventId) -> EventDetail:
        """One event whole: verdict, prompt, frames with their boxes, and what was made from what."""
        return await source.event(event_id)


def _add_cameras(api: APIRouter, source: Source) -> None:
    """Cameras, what they did, and their pictures."""

    @api.get("/api/cameras", responses=errors(503))
    async def cameras() -> list[CameraCard]:
        """Every camera, by name."""
        return list(await source.cameras())

    @api.get("/api/cameras/{camera_id}/timeline", responses=errors(404, 422, 503))
    async def timeline(
        camera_id: Annotated[CameraId, Path()],
        since: Annotated[
            Moment | SkipJsonSchema[None], Query(description="By default 24 hours before `until`.")
        ] = None,
        until: Annotated[
            Moment | SkipJsonSchema[None], Query(description="By default now; 31 days after `since` at most.")
        ] = None,
    ) -> Timeline:
        """What a camera did: its hours, events, gaps and labels."""
        end = until or datetime.now(UTC)
        try:
            begin = since or end - timedelta(days=1)
        except OverflowError as error:
            raise InvalidError("`until` is no time of a camera") from error
        return await source.timeline(camera_id, begin, end)

    @api.get(
        "/api/images/{camera_id}/{sha256}.jpg",
        response_class=Response,
        responses={
            200: {"description": "The JPEG as it came.", "content": {"image/jpeg": {"schema": _BINARY}}},
            304: {"description": "Unchanged, as always: it is named by its content."},
            **errors(404, 422, 503),
        },
    )
    async def image(
        request: Request,
        camera_id: Annotated[CameraId, Path()],
        sha256: Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of its bytes, hex.")],
    ) -> Response:
        """A frame's picture."""
        headers = {"ETag": f'"{sha256}"', "Cache-Control": f"private, max-age={_YEAR_S}, immutable"}
        if f'"{sha256}"' in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(await source.image(camera_id, sha256), media_type="image/jpeg", headers=headers)


def _add_doors(api: APIRouter, source: Source, uploads: Uploads) -> None:
    """What goes in, and how everything is."""

    @api.get("/api/health", responses=errors())
    async def health() -> Health:
        """How the whole pipeline is, at most two seconds old; what is away is a problem in it."""
        return await source.health()

    @api.post("/api/labels", status_code=201, responses=errors(400, 404, 408, 413, 422, 503))
    async def label(new: NewLabel) -> Label:
        """Put a person's verdict on the log: on an event, or on a span in which one was missed."""
        return await source.label(new)

    @api.post(
        "/api/upload",
        response_class=Response,
        responses={
            200: {"model": Taken, "description": "It is on the log."},
            **errors(400, 404, 408, 413, 422, 503),
        },
        openapi_extra={"requestBody": _UPLOAD},
    )
    async def upload(
        request: Request,
        camera: Annotated[str | None, Query(description="Which camera; a multipart form may say it instead.")] = None,
        captured_at: Annotated[str | None, Query(description="When it was taken: ISO 8601 or Unix time.")] = None,
        name: Annotated[str | None, Query(description="Its file's name.")] = None,
    ) -> Response:
        """Take one JPEG; answered when it is on the log. Sending it again changes nothing."""
        del camera, captured_at, name  # ingest reads them from the query itself
        return await uploads.post(request)

    @api.get("/health", responses={})
    async def serving() -> Serving:
        """Whether the process serves, for probes; it needs no key."""
        return Serving()


_BINARY = {"type": "string", "format": "binary"}
_UPLOAD = {
    "required": True,
    "content": {
        "image/jpeg": {"schema": _BINARY},
        "application/octet-stream": {"schema": _BINARY},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"file": _BINARY, "camera": {"type": "string"}, "captured_at": {"type": "string"}},
                "required": ["file"],
            }
        },
    },
}


class _Streams:
    """The open streams of live events."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._open = 0

    def open(self, after: str | None, last_event_id: str | None, *, until: float) -> Response:
        if self._open >= _STREAMS:
            raise HTTPException(429, "too many streams at once", headers={"Retry-After": "10"})
        # A browser sends its last id for ever: one that is none of ours must not keep it out.
        events = None
        if last_event_id:
            try:
                events = self._source.live(after=last_event_id)
            except InvalidError:
                events = None
        if events is None:
            events = self._source.live(after=after)
        return StreamingResponse(
            self._written(events, until), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
        )

    async def _written(self, events: AsyncGenerator[tuple[str, EventSummary]], until: float) -> AsyncIterator[str]:
        """The stream as text, with a comment when nothing came for a while: else nobody learns that a client left."""
        self._open += 1
        pending: asyncio.Task[tuple[str, EventSummary]] | None = None
        try:
            yield f"retry: {_RETRY_MS}\n\n"
            while (left_s := until - time.time()) > 0:
                if pending is None:
                    pending = asyncio.create_task(anext(events))
                await asyncio.wait({pending}, timeout=min(HEARTBEAT_S, left_s))
                if not pending.done():
                    yield ": still here\n\n"
                    continue
                try:
                    cursor, event = pending.result()
                except StopAsyncIteration:
                    return
                pending = None
                yield f"event: event\nid: {cursor}\ndata: {event.model_dump_json()}\n\n"
        finally:
            self._open -= 1
            if pending is not None:
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)
            await events.aclose()
