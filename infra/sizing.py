"""How large an installation becomes: bytes measured on real footage, and the arithmetic from cameras to disks. Pure."""

import math
from typing import NamedTuple

from streams.claims import INLINE_LIMIT
from streams.topics import TOPICS

DAY_S = 86_400

FRAME_ON_LOG = 270
"""Bytes of a frame's record on the broker without its image: ids, times, the batch around it, its share of markers.

Each of these constants was measured on a month of the demo's footage (5,376 frames, 513 windows) and on a single day of
it, by `tests/e2e/demo_bytes.py`, which holds a demo's day to them within a fifth. With one replica.
"""

DETECTIONS_ON_LOG = 335
"""Bytes of what was seen in one frame, with 1.9 boxes on average; another box is 31 bytes more."""

WINDOW_ON_LOG = 3_000
"""Bytes of a window and its context, of 10 frames on average."""

EVENT_ON_LOG = 2_000
"""Bytes of a verdict with its prompt, completion and lineage."""

FRAME_IN_STORE = 350
"""Bytes of a frame and its detections in ClickHouse, compressed, `log` and typed tables together, without the image."""

WINDOW_IN_STORE = 3_300
"""Bytes of a window, its context and its verdict there."""

INGEST_STATE = 8_000
"""Bytes that ingest writes again with each transaction of a camera: its last 1,000 ids, 8 bytes each. Compacted."""

BROKERS_OWN = 5 * 10**9
"""Bytes of what is compacted, at most: Kafka's 2 internal topics of 8 partitions with segments of 100 MB, and 3 of ours
of 16 partitions with segments of 16 MB, each twice: one being written, one not compacted yet."""

SEGMENT, SEGMENT_DAYS = 2**30, 7
"""Kafka's defaults: a partition's file is closed at 1 GiB or after a week, and goes whole, when its last record may."""

BUSY = 0.7
"""Of a model's time: beyond it frames wait longer for their turn than for the model (M/D/1 at 0.7: 1.2 services)."""

PEAK = 5
"""Windows in a busy hour against those of an average one: people come by day."""


class Site(NamedTuple):
    """What is watched, and by which models."""

    cameras: int
    fps: float
    """Images a second of each camera, over the whole day."""
    image: int = 37_000
    """Bytes of an image: 640 x 360 at quality 85 as the demo's cameras have it; 113,000 of 1280 x 720."""
    windows: int = 40
    """Of each camera, a day."""
    keep_days: int = 30
    """In ClickHouse, and images."""
    inference_ms: float = 20
    """Of one image, its share of a batch."""
    judge_s: float = 5
    """Of one window, in one slot of the LLM."""


class Size(NamedTuple):
    """What it takes. Bytes are decimal, rates are of a second."""

    frames: float
    windows: float
    """A day."""
    written: float
    """Bytes a second that come to the broker, from ingest and from detect."""
    broker: float
    """Bytes on its disk at most, when the first records are as old as they get."""
    store: float
    """Bytes in ClickHouse, after `keep_days`."""
    images: float
    """Bytes in the image store, after `keep_days`."""
    detectors: int
    """Processes of detect, each with a card, or one service that is as fast."""
    slots: int
    """Of the LLM, in a busy hour."""
    partitions: int
    """The least that is worth making: they are fixed, and a worker without one is idle."""


def size(site: Site) -> Size:
    """The arithmetic, as docs/sizing.md has it."""
    frames = site.cameras * site.fps
    windows = site.cameras * site.windows
    inline = site.image if site.image <= INLINE_LIMIT else 0
    detectors = max(1, math.ceil(frames * site.inference_ms / 1000 / BUSY))
    slots = max(1, math.ceil(PEAK * windows / DAY_S * site.judge_s / BUSY))
    partitions = max(16, 1 << math.ceil(math.log2(2 * max(detectors, slots))))

    def kept(topic: str, a_day: float) -> float:
        days = TOPICS[topic].retention_ms / 1000 / DAY_S
        return days * a_day + min(SEGMENT_DAYS * a_day, partitions * SEGMENT)

    return Size(
        frames=frames,
        windows=windows,
        written=frames * (FRAME_ON_LOG + inline + DETECTIONS_ON_LOG + INGEST_STATE),
        broker=kept("frames", DAY_S * frames * (FRAME_ON_LOG + inline))
        + kept("detections", DAY_S * frames * DETECTIONS_ON_LOG)
        + kept("contexts", windows * WINDOW_ON_LOG)
        + kept("risk_events", windows * EVENT_ON_LOG)
        + BROKERS_OWN,
        store=site.keep_days * (DAY_S * frames * (FRAME_IN_STORE + inline) + windows * WINDOW_IN_STORE),
        images=site.keep_days * DAY_S * frames * (site.image - inline),
        detectors=detectors,
        slots=slots,
        partitions=partitions,
    )
