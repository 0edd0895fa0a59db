"""A detector service over HTTP: POST /detect/batch, as the API that clients of RT-DETR services already speak."""

import io
import math
from collections.abc import Sequence

import httpx
from PIL import Image

from processors.detect.core import MAX_BOXES, MIN_SCORE
from processors.detect.settings import DetectorSettings
from schemas.records import Box
from streams.errors import UnavailableError

_JPEG_QUALITY = 95  # high enough that boxes do not move; the service decodes what the camera encoded once more


class HttpDetector:
    """The model behind `detector.url`. Its weights cannot be read from here, so the digest is empty."""

    digest = ""
    runtime = "http"

    def __init__(self, settings: DetectorSettings) -> None:
        assert settings.url is not None
        headers = {"Authorization": f"Bearer {settings.api_key.get_secret_value()}"} if settings.api_key else {}
        self._client = httpx.Client(
            base_url=settings.url,
            headers=headers,
            timeout=httpx.Timeout(60, connect=5),
        )
        self.name = settings.url

    def detect(self, images: Sequence[Image.Image]) -> list[tuple[Box, ...]]:
        """The boxes of each image, pixels, best first.

        Raises:
            UnavailableError: the service is away, overloaded, or answers with an error.
        """
        files = [("files", (f"{index}.jpg", _jpeg(image), "image/jpeg")) for index, image in enumerate(images)]
        try:
            answer = self._client.post("/detect/batch", files=files)
            answer.raise_for_status()
            results = answer.json()["results"]
            return [_boxes(result["detections"]) for result in results]
        except (httpx.HTTPError, KeyError, ValueError, TypeError) as error:
            raise UnavailableError("detector", f"{self.name} (detector.url, RTDETR_URL): {error!r}") from error


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
