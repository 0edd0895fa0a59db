"""Ingest's own HTTP endpoint: `POST /api/upload?camera=ID` with a JPEG; answered only when it is committed."""

from collections.abc import Callable
from typing import Any

import structlog
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from processors.ingest import core
from processors.ingest.appender import Appenders
from processors.ingest.settings import UploadSettings
from streams.admission import Guard
from streams.doors import check_sender, refusal, refuse, take_body
from streams.errors import UnavailableError

log = structlog.get_logger(__name__)

# What a multipart body has besides the image: boundaries, part headers, a few short fields.
_MULTIPART_OVERHEAD = 64 * 1024

# When to come back, seconds: a broker restarts in about four, a full queue drains in one.
_RETRY_AWAY_S = 5
_RETRY_BUSY_S = 1


def build_app(
    appenders: Appenders,
    settings: UploadSettings,
    waiting_on: Callable[[], list[str]] = list,
) -> Starlette:
    """The ASGI app.

    Args:
        appenders: the ways into the log.
        settings: `ingest.upload`.
        waiting_on: what ingest as a whole waits on, for `/health`.
    """
    upload = _Upload(appenders, settings)

    async def health(_request: Request) -> Response:
        waits = waiting_on()
        return JSONResponse({"status": "waiting" if waits else "ok", "waiting_on": waits})

    return Starlette(
        routes=[
            Route("/api/upload", upload.post, methods=["POST"]),
            Route("/health", health, methods=["GET"]),
        ],
        exception_handlers={HTTPException: refusal, Exception: _fault},
    )


class _Upload:
    def __init__(self, appenders: Appenders, settings: UploadSettings) -> None:
        self._appenders = appenders
        self._settings = settings
        self._guard = Guard(settings)
        self._in_hand = 0

    async def post(self, request: Request) -> Response:
        """Take one image; see the module."""
        check_sender(
            request,
            self._guard,
            "upload",
            to_pages="uploads by web pages are refused here; the gateway takes those of its own page",
        )
        if self._in_hand >= self._settings.max_waiting:
            self._appenders.turned_away(request.query_params.get("camera"), "upload", "shed")
            raise refuse(429, "too many uploads at once (ingest.upload.max_waiting)", _RETRY_BUSY_S)
        if why := self._appenders.shed.why:
            self._appenders.turned_away(request.query_params.get("camera"), "upload", "shed")
            raise refuse(429, f"too much work waits: {why}", self._appenders.settings.shed.retry_after_s)
        self._in_hand += 1
        try:
            return await self._take(request)
        except core.UnknownCameraError as error:
            raise refuse(404, str(error)) from error
        except core.RejectedError as error:
            self._appenders.turned_away(request.query_params.get("camera"), "upload", "rejected")
            raise refuse(400, str(error)) from error
        except UnavailableError as error:
            raise refuse(503, str(error), _RETRY_AWAY_S) from error
        except ClientDisconnect as error:
            raise refuse(400, "the connection ended before the image did") from error
        finally:
            self._in_hand -= 1

    async def _take(self, request: Request) -> Response:
        # What can be refused by its head alone is refused before the body is read.
        camera_id = request.query_params.get("camera")
        if camera_id is not None:
            await self._appenders.camera(camera_id, create=self._settings.auto_create)
        fields, data, name = await self._read(request)
        camera_id = camera_id or fields.get("camera")
        if not camera_id:
            raise refuse(400, "which camera? POST /api/upload?camera=ID")
        await self._appenders.camera(camera_id, create=self._settings.auto_create)
        captured_at = request.query_params.get("captured_at") or fields.get("captured_at")
        zone = self._appenders.zone(camera_id)
        submission = core.Submission(
            camera_id=camera_id,
            data=data,
            source="upload",
            name=name,
            arrived_at=self._appenders.now_ms(),
            client_at=core.client_time(captured_at, zone) if captured_at else None,
        )
        entry = await self._appenders.prepare(submission)
        (receipt,) = await self._appenders.append(camera_id, [entry])
        return JSONResponse({"frame_id": receipt.frame_id, "status": receipt.status})

    async def _read(self, request: Request) -> tuple[dict[str, str], bytes, str]:
        """The body's fields, the image and its name."""
        multipart = request.headers.get("content-type", "").startswith("multipart/form-data")
        limit = self._appenders.settings.max_bytes + (_MULTIPART_OVERHEAD if multipart else 0)
        body = bytearray()
        await take_body(
            request,
            body.extend,
            limit=limit,
            within_s=self._settings.timeout_s,
            too_long=refuse(413, f"more than {self._appenders.settings.max_bytes:,} bytes (ingest.max_bytes)"),
            too_slow=refuse(
                408, f"the image did not arrive within {self._settings.timeout_s:g} s (ingest.upload.timeout_s)"
            ),
        )
        if not multipart:
            return {}, bytes(body), request.query_params.get("name", "")
        # Parsed from memory, where its size is already known to be in bounds.
        replayed = Request(request.scope, _replay(bytes(body)))
        async with replayed.form(max_files=1, max_fields=8, max_part_size=4096) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise refuse(400, "the multipart form has no file part named `file`")
            fields = {key: value for key, value in form.items() if isinstance(value, str)}
            return fields, await file.read(), file.filename or ""


async def _fault(_request: Request, _error: Exception) -> Response:
    # Starlette raises it again behind this answer, so the server logs it.
    return JSONResponse({"error": "ingest failed on this image; its log says why"}, 500)


def _replay(body: bytes) -> Callable[[], Any]:
    """An ASGI `receive` that gives a body already read."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        return next(messages)

    return receive
