"""A detector service over HTTP: POST /detect/batch, as the API that clients of RT-DETR services already speak.

A frame is lost for no failure of the service: whatever may pass is `UnavailableError`, so the stage waits and asks
again. Only when the service refuses one picture, or breaks off or hangs when it is asked for that one alone, and takes
a good one after it, is the picture to blame.
"""

import hashlib
import io
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import structlog
from PIL import Image

from processors.detect.breaker import Breaker
from processors.detect.core import MAX_BOXES, MIN_SCORE
from processors.detect.settings import DetectorSettings
from schemas.records import Box
from streams.errors import UnavailableError, UnprocessableError, explain
from streams.redaction import credentials

log = structlog.get_logger(__name__)

_JPEG_QUALITY = 95  # high enough that boxes do not move; the service decodes what the camera encoded once more

# Another try comes soon or not at all: the stage itself waits longer and longer, and says so meanwhile.
_FIRST_PAUSE_S = 0.25
_RETRY_WITHIN_S = 5.0

# Answers that blame what was sent. 401, 403, 404 and 405 blame the settings: every frame would be refused.
_REFUSALS = frozenset({400, 413, 415, 422})
_BUSY = frozenset({429, 503})

# So many suspects are remembered: more than were ever asked for at once.
_SUSPECTS = 1024

# What any detector takes: grey, with nothing in it.
_CANARY = Image.new("RGB", (64, 64), (128, 128, 128))


class _Failed(Exception):  # noqa: N818 (caught here)
    """The service is away or broken; asking again may help."""

    def __init__(
        self, why: str, *, retry_after: float | None = None, hung: bool = False, broke_off: bool = False
    ) -> None:
        super().__init__(why)
        self.retry_after = retry_after
        self.hung = hung
        self.broke_off = broke_off


class _Refused(Exception):  # noqa: N818 (caught here)
    """The service takes no such pictures, or, `at_fault`, failed on them: so it says."""

    def __init__(self, why: str, *, at_fault: bool = False) -> None:
        super().__init__(why)
        self.at_fault = at_fault


class _BrokeOffError(UnavailableError):
    """It hung, or its connection broke, while it had the pictures: one of them may be why."""


class HttpDetector:
    """The model behind `detector.url`; its name and digest as the service tells them with the boxes."""

    def __init__(
        self,
        settings: DetectorSettings,
        *,
        transport: httpx.BaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert settings.url is not None
        self._settings = settings.client
        self._url = credentials(settings.url)
        headers = {"Authorization": f"Bearer {settings.api_key.get_secret_value()}"} if settings.api_key else {}
        self._client = httpx.Client(
            base_url=settings.url,
            headers=headers,
            timeout=httpx.Timeout(settings.client.read_timeout_s, connect=settings.client.connect_timeout_s),
            transport=transport,
            trust_env=False,
            verify=settings.client.trusted(),
        )
        self._clock = clock
        self._closed = threading.Event()
        self._breaker = Breaker(settings.client.breaker_failures, settings.client.breaker_s, clock)
        self._suspects: dict[bytes, bool] = {}
        """Pictures that it had when it broke off or hung, by hash; whether it had that one alone."""
        self._asked_name = False
        self.name = self._url
        self.digest = ""
        self.runtime = "http"

    def detect(self, images: Sequence[Image.Image]) -> list[tuple[Box, ...]]:
        """The boxes of each image, pixels, best first.

        Raises:
            UnavailableError: the service is away, overloaded, set up wrongly, or answers nonsense.
            UnprocessableError: it takes no such picture (of several: ask one by one), and takes others.
            RuntimeError: it failed, broke off or hung on this picture (of several: ask one by one), and answers others.
        """
        pictures = [_jpeg(image) for image in images]
        keys = [hashlib.sha256(picture).digest() for picture in pictures]
        alone = len(keys) == 1
        if self._suspects.get(keys[0]) if alone else not self._suspects.keys().isdisjoint(keys):
            self._ask_canary()  # whoever is away, or hangs, whatever it is asked, is waited for
            if not alone:
                raise RuntimeError("the detector's service broke off or hung on one of these pictures")
            self._suspects[keys[0]] = False  # asked again for the next attempt
            raise RuntimeError("the detector's service broke off or hung on this picture, and answers others")
        try:
            found = self._ask(pictures)
        except _BrokeOffError:
            self._suspects |= dict.fromkeys(keys, alone)
            for key in list(self._suspects)[:-_SUSPECTS]:
                del self._suspects[key]
            raise
        except _Refused as error:
            if len(images) == 1:
                self._ask_canary(error)
            if error.at_fault:  # it may have been for once: attempts are counted
                raise RuntimeError(f"the detector's service failed on this picture: {error}") from error
            raise UnprocessableError(f"the detector's service takes no such picture: {error}") from error
        for key in keys:
            self._suspects.pop(key, None)
        return found

    def close(self) -> None:
        """Close the connections; whoever waits for another try goes without."""
        self._closed.set()
        self._client.close()

    def _ask_canary(self, error: Exception | None = None) -> None:
        """Ask for a picture that every service takes: where it is refused too, no frame is to blame."""
        try:
            self._ask([_jpeg(_CANARY)])
        except _Refused as again:
            self._breaker.failed(str(again))
            raise self._unavailable(f"it refuses every picture: {again}") from error

    def _ask(self, pictures: list[bytes]) -> list[tuple[Box, ...]]:
        """The service's answer, tried again a few times."""
        if (wait := self._breaker.wait_s()) > 0:
            raise self._unavailable(f"not asked for {wait:.0f} s more: {self._breaker.why}")
        tries = 1 if self._breaker.is_trial else 1 + self._settings.retries
        give_up_at = self._clock() + _RETRY_WITHIN_S
        pause = _FIRST_PAUSE_S
        away: Callable[[str], UnavailableError] = self._unavailable
        while True:
            tries -= 1
            try:
                found = self._once(pictures)
            except _Failed as error:
                if error.broke_off:
                    away = self._broke_off
                wait = max(pause * random.uniform(0.5, 1.5), error.retry_after or 0.0)
                over = tries <= 0 or self._clock() + wait > give_up_at
                if error.retry_after is None:
                    # Who waited for a minute has waited for all of them: the next batch must not do it again.
                    self._breaker.failed(str(error), times=self._settings.breaker_failures if error.hung else 1)
                elif over:  # busy, or not ready yet: no fault, but it says itself when to come
                    self._breaker.open_for(error.retry_after, str(error))
                if over or self._breaker.wait_s() > 0:
                    raise away(str(error)) from error
                pause *= 2
                if self._closed.wait(wait):
                    raise self._unavailable(str(error)) from error
            else:
                self._breaker.answered()
                return found

    def _once(self, pictures: list[bytes]) -> list[tuple[Box, ...]]:
        files = [("files", (f"{index}.jpg", data, "image/jpeg")) for index, data in enumerate(pictures)]
        try:
            # Services that know no such parameter answer what they hold for likely.
            answer = self._client.post("/detect/batch", params={"min_confidence": MIN_SCORE}, files=files)
        except httpx.ReadTimeout as error:
            raise _Failed(explain(error), hung=True, broke_off=True) from error
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as error:
            raise _Failed(explain(error), broke_off=True) from error
        except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: it was closed meanwhile
            raise _Failed(explain(error)) from error
        if answer.status_code in _REFUSALS or answer.status_code == 500:
            raise _Refused(_said(answer), at_fault=answer.status_code == 500)
        if not answer.is_success:
            retry_after = _retry_after(answer) if answer.status_code in _BUSY else None
            raise _Failed(_said(answer), retry_after=retry_after)
        try:
            results = answer.json()["results"]
            if len(results) != len(pictures):
                raise ValueError(f"{len(results)} results for {len(pictures)} pictures")
            for result in results:
                if "error" in result:
                    raise _Refused(str(result["error"])[:500], at_fault=result.get("status", 400) >= 500)
            found = [_boxes(result["detections"]) for result in results]
        except (KeyError, ValueError, TypeError) as error:
            raise _Failed(f"its answer is not understood: {error!r}") from error
        self._take_name(results)
        return found

    def _take_name(self, results: list[dict[str, Any]]) -> None:
        """Who made these boxes: our own service says it in each result, others in /health or not at all."""
        one = results[0] if results else {}
        if isinstance(one.get("model_digest"), str) and isinstance(one.get("model"), str):
            self.name, self.digest = one["model"], one["model_digest"]
            self.runtime = f"http:{one['runtime']}" if isinstance(one.get("runtime"), str) else "http"
            return
        self.digest, self.runtime = "", "http"
        if not self._asked_name:
            self._asked_name = True
            try:
                name = self._client.get("/health").json().get("model_name")
            except (httpx.HTTPError, RuntimeError, ValueError, AttributeError):
                name = None
            self.name = name if isinstance(name, str) and name else self._url

    def _unavailable(self, why: str) -> UnavailableError:
        return UnavailableError("detector", self._where(why))

    def _broke_off(self, why: str) -> UnavailableError:
        return _BrokeOffError("detector", self._where(why))

    def _where(self, why: str) -> str:
        return f"{self._url} (detector.url, RTDETR_URL): {why}"


def _said(answer: httpx.Response) -> str:
    """The service's own words of an error, bounded."""
    try:
        body = answer.json()
        words = str(body.get("error") or body.get("detail") or "")
    except (ValueError, AttributeError):
        words = answer.text
    return f"HTTP {answer.status_code}: {words[:500]}" if words else f"HTTP {answer.status_code}"


def _retry_after(answer: httpx.Response) -> float | None:
    """Seconds; a date is not worth parsing, for no detector's service sends one."""
    said = answer.headers.get("retry-after", "")
    return min(float(said), 600.0) if said.isascii() and said.isdigit() else None


def _jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_JPEG_QUALITY)
    return out.getvalue()


def _boxes(detections: list[dict[str, object]]) -> tuple[Box, ...]:
    found = []
    for detection in detections:
        box = detection["bbox"]
        score = float(detection["confidence"])  # type: ignore[arg-type]
        # Written so that NaN is refused. Percents would be: a service that says so is set up wrongly, for every frame.
        if not 0 <= score <= 1:
            raise ValueError(f"confidence {score} is not between 0 and 1")
        if score >= MIN_SCORE and isinstance(box, dict):
            x, y, width, height = (float(box[side]) for side in ("x", "y", "width", "height"))
            if not all(map(math.isfinite, (x, y, width, height))):
                raise ValueError(f"a box at {x}, {y} of {width} x {height}")
            found.append(
                Box(label=str(detection["class"]), score=round(score, 4), x=x, y=y, width=width, height=height)
            )
    return tuple(sorted(found, key=lambda box: -box.score)[:MAX_BOXES])
