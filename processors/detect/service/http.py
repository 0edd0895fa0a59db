"""The service's HTTP: `/detect`, `/detect/batch`, `/health`, `/metrics`, as clients of RT-DETR services know them.

Beyond what they know: `?min_confidence=`, a reason in the place of each file of a batch that cannot be taken, and who
made the boxes (`model`, `model_digest`, `runtime`) in each result. Every refusal is `{"error": ...}`.
"""

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from typing import Any, NamedTuple, TypeVar

import structlog
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from processors.detect.detector import Batcher, Detector, Seen
from processors.detect.service import gpu
from processors.detect.service.forms import File, form_of, too_long
from processors.detect.service.metrics import ServiceMetrics
from processors.detect.service.pictures import Pictures
from processors.detect.service.room import Room
from processors.detect.settings import ServiceSettings
from streams.admission import Guard
from streams.doors import check, check_sender, refusal, refuse, take_body
from streams.errors import UnavailableError, UnprocessableError
from streams.scraping import exposition

log = structlog.get_logger(__name__)

T = TypeVar("T")

# When to come back, seconds: a model is loaded in some seconds, and a service that stops has a successor then.
_RETRY_AWAY_S = 5
_RETRY_MOST_S = 60


class Model(NamedTuple):
    """What answers, when it is loaded."""

    detector: Detector
    batcher: Batcher


class Door:
    """Takes requests, within bounds, and answers them."""

    def __init__(self, settings: ServiceSettings, registry: CollectorRegistry) -> None:
        self._settings = settings
        self._guard = Guard(settings)
        self._registry = registry
        self._pictures = Pictures(settings)
        self._bodies = Room(settings.bodies_mb * 1_000_000)
        self._in_hand = 0
        self._gpu = gpu.Probe()
        self._idle = asyncio.Event()
        self._idle.set()
        self._ending = False
        self._given_up = asyncio.Event()
        self._metrics = ServiceMetrics()
        self._metrics.in_hand = lambda: self._in_hand
        self._metrics.memory = lambda: {"bodies": self._bodies.taken, "pixels": self._pictures.room.taken}
        registry.register(self._metrics)
        self.model: Model | None = None
        """Set when it is warm: requests are taken from then on."""

    def app(self) -> ASGIApp:
        """The ASGI app."""
        app = Starlette(
            routes=[
                Route("/detect", self._detect, methods=["POST"]),
                Route("/detect/batch", self._batch, methods=["POST"]),
                Route("/health", self._health),
                Route("/metrics", self._scraped),
            ],
            exception_handlers={HTTPException: refusal, Exception: _fault},
        )
        return self._metrics.counting(app)

    async def drain(self, within_s: float) -> bool:
        """Take no more; whether what is in hand was answered within so many seconds. The rest is told to come back."""
        self._ending = True
        try:
            async with asyncio.timeout(within_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("not answered before the stop: told to come back", pictures=self._in_hand)
            self._given_up.set()
            await self._idle.wait()
            return False
        return True

    def close(self) -> None:
        """Let go of the threads."""
        self._pictures.close()

    async def _detect(self, request: Request) -> Response:
        with self._admitted(request) as hand:
            files, least = await self._read(request, hand, most=1)
            (answer,) = await self._seen(request, hand, files, least)
            if isinstance(answer, HTTPException):
                raise answer
            return JSONResponse(answer)

    async def _batch(self, request: Request) -> Response:
        with self._admitted(request) as hand:
            files, least = await self._read(request, hand, most=self._settings.max_files)
            answers = await self._seen(request, hand, files, least)
            results: list[dict[str, Any]] = [
                {"filename": file.name}
                | (
                    {"error": answer.detail, "status": answer.status_code}
                    if isinstance(answer, HTTPException)
                    else answer
                )
                for file, answer in zip(files, answers, strict=True)
            ]
            if all(isinstance(answer, HTTPException) and answer.status_code == 503 for answer in answers):
                raise refuse(503, results[0]["error"], _RETRY_AWAY_S)
            took = sum(result.get("inference_time_ms", 0.0) for result in results)
            return JSONResponse(
                {"results": results, "total_inference_time_ms": round(took, 3), "num_images": len(results)}
            )

    async def _health(self, _request: Request) -> Response:
        model = self.model
        told = await self._gpu.readings(model.detector.runtime if model is not None else "")
        status = "loading" if model is None else "stopping" if self._ending else "healthy"
        return JSONResponse(
            {
                "status": status,
                "model_loaded": model is not None,
                "model_name": model.detector.name if model is not None else None,
                "model_digest": model.detector.digest if model is not None else None,
                "runtime": model.detector.runtime if model is not None else None,
                **told,
            },
            200 if status == "healthy" else 503,
            headers={} if status == "healthy" else {"Retry-After": str(_RETRY_AWAY_S)},
        )

    async def _scraped(self, request: Request) -> Response:
        check(request, self._guard, "read")
        return exposition(request, self._registry)

    @contextlib.contextmanager
    def _admitted(self, request: Request) -> "Iterator[_Hand]":
        """Let a request in, or refuse it by its head alone."""
        check_sender(request, self._guard, "upload", to_pages="pictures sent by web pages are refused here")
        if self._ending:
            raise refuse(503, "the detector is stopping", _RETRY_AWAY_S)
        if self.model is None:
            raise refuse(503, "the model is still loading", _RETRY_AWAY_S)
        hand = _Hand(self)
        try:
            hand.count(1)
            yield hand
        except ClientDisconnect as error:
            raise refuse(400, "the connection ended before the answer") from error
        finally:
            hand.let_go()

    async def _read(self, request: Request, hand: "_Hand", *, most: int) -> tuple[list[File], float]:
        """The files of a request, and the least confidence that it asks for."""
        least = _least(request, self._settings.min_confidence)
        form = form_of(request.headers.get("content-type", ""), self._settings, most, hand.grab)
        taking = take_body(
            request,
            form.feed,
            limit=form.limit,
            within_s=self._settings.timeout_s,
            too_long=too_long(self._settings),
            too_slow=refuse(
                408, f"the body did not arrive within {self._settings.timeout_s:g} s (detector.service.timeout_s)"
            ),
        )
        await self._unless_ended(taking, within_s=None)
        files = form.end()
        if not files:
            raise refuse(400, 'no file in it: a part named `file` (several: `files`), or JSON\'s "image"')
        hand.count(len(files))
        return files, least

    async def _seen(
        self, request: Request, hand: "_Hand", files: list[File], least: float
    ) -> list[dict[str, Any] | HTTPException]:
        """Each file's answer, or its refusal; for as long as somebody waits for them."""
        assert self.model is not None, "nobody is admitted before"
        batcher = self.model.batcher

        async def all_of_them() -> list[dict[str, Any] | HTTPException]:
            return await asyncio.gather(*(self._one(file, batcher, least) for file in files))

        answers = await self._unless_ended(all_of_them(), gone=_gone(request), within_s=self._settings.deadline_s)
        hand.answered(answers)
        return answers

    async def _one(self, file: File, batcher: Batcher, least: float) -> dict[str, Any] | HTTPException:
        if file.refused is not None:
            return file.refused
        try:
            async with self._pictures.of(file.data) as picture:
                return _answer(await batcher.detect(picture), picture.size, least)
        except UnprocessableError as error:
            return refuse(400, str(error))
        except UnavailableError as error:
            return refuse(503, str(error), _RETRY_AWAY_S)
        except Exception:
            log.exception("the model failed on a picture", file=file.name)
            return refuse(500, "the model failed on this picture; the service's log says why")

    async def _unless_ended(
        self, work: Coroutine[Any, Any, T], *, gone: Coroutine[Any, Any, None] | None = None, within_s: float | None
    ) -> T:
        """What the work gives.

        Raises:
            HTTPException: 503, it was not there within so many seconds, or before a stop.
            ClientDisconnect: whoever asked has `gone` before that.
        """
        working, given_up = asyncio.create_task(work), asyncio.create_task(self._given_up.wait())
        leaving = [asyncio.create_task(gone)] if gone is not None else []
        try:
            await asyncio.wait({working, given_up, *leaving}, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            if any(task.done() for task in leaving):
                raise ClientDisconnect
            if given_up.done():
                raise refuse(503, "the detector is stopping", _RETRY_AWAY_S)
            raise refuse(
                503, f"the model did not answer within {within_s:g} s (detector.service.deadline_s)", self._wait_s()
            )
        finally:
            for task in (working, given_up, *leaving):
                task.cancel()
            await asyncio.gather(working, given_up, *leaving, return_exceptions=True)

    def _wait_s(self) -> float:
        """How long until what is in hand has been worked off, seconds, by what pictures have taken so far."""
        counts = self.model.batcher.metrics if self.model is not None else None
        each = counts.batch_seconds.sum / counts.batch_images.sum if counts and counts.batch_images.sum else 0.0
        return min(max(1.0, each * self._in_hand), _RETRY_MOST_S)


class _Hand:
    """What one request holds: pictures, and bytes of its body."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._pictures = 0
        self._bytes = 0

    def count(self, pictures: int) -> None:
        """Hold so many pictures.

        Raises:
            HTTPException: 429, there are too many in hand.
        """
        door = self._door
        if door._in_hand + pictures - self._pictures > door._settings.max_waiting:  # noqa: SLF001 (one module)
            raise refuse(429, "too many pictures at once (detector.service.max_waiting)", door._wait_s())  # noqa: SLF001
        self._set(pictures)

    def grab(self, count: int) -> None:
        """Hold so many bytes more, or fewer.

        Raises:
            HTTPException: 429, there is no room for them; 413, there never is.
        """
        bodies = self._door._bodies  # noqa: SLF001
        if count < 0:
            bodies.give(-count)
        elif self._bytes + count > bodies.size:
            raise refuse(413, f"more than {bodies.size:,} bytes in one request (detector.service.bodies_mb)")
        elif not bodies.grab(count):
            raise refuse(429, "too many bytes at once (detector.service.bodies_mb)", self._door._wait_s())  # noqa: SLF001
        self._bytes += count

    def answered(self, answers: list[dict[str, Any] | HTTPException]) -> None:
        """Count what became of its files."""
        for answer in answers:
            self._door._metrics.files.add("refused" if isinstance(answer, HTTPException) else "answered")  # noqa: SLF001

    def let_go(self) -> None:
        """Hold nothing."""
        self._set(0)
        self._door._bodies.give(self._bytes)  # noqa: SLF001
        self._bytes = 0

    def _set(self, pictures: int) -> None:
        door = self._door
        door._in_hand += pictures - self._pictures  # noqa: SLF001
        self._pictures = pictures
        if door._in_hand:  # noqa: SLF001
            door._idle.clear()  # noqa: SLF001
        else:
            door._idle.set()  # noqa: SLF001


def _answer(seen: Seen, size: tuple[int, int], least: float) -> dict[str, Any]:
    return {
        "detections": [
            {
                "class": box.label,
                "confidence": box.score,
                "bbox": {"x": box.x, "y": box.y, "width": box.width, "height": box.height},
            }
            for box in seen.boxes
            if box.score >= least
        ],
        "inference_time_ms": round(seen.inference_ms, 3),
        "image_width": size[0],
        "image_height": size[1],
        "model": seen.model,
        "model_digest": seen.model_digest,
        "runtime": seen.runtime,
    }


def _least(request: Request, default: float) -> float:
    said = request.query_params.get("min_confidence")
    if said is None:
        return default
    with contextlib.suppress(ValueError):
        if 0 <= (least := float(said)) <= 1:
            return least
    raise refuse(400, f"min_confidence is a number from 0 to 1 (got {said[:40]!r})")


async def _gone(request: Request) -> None:
    """Until whoever asked has gone; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _fault(_request: Request, _error: Exception) -> Response:
    # Starlette raises it again behind this answer, so the server logs it.
    return JSONResponse({"error": "the detector failed on this request; its log says why"}, 500)
