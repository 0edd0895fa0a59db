"""The detector's service under mixed load: `python -m tests.bench.service_load --requests 10000`.

Good, bad and huge requests come side by side over 50 connections to a service in a process of its own, whose model only
sleeps (`--real`: the demo's detector). A good client comes back after a 429. Told: answers by status, good ones that
were answered wrongly (none may be), any 500 (none may be), and the service's memory before and at its peak.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import random
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from PIL import Image

from infra import logs
from processors.detect.detector import Detector, FakeDetector
from processors.detect.service.service import Service
from processors.detect.settings import ClientSettings, DetectorSettings, ServiceSettings
from schemas.records import Box

AT_ONCE = 50
SLEEP_S = 0.004
"""A batch: 250 of them a second, so that the model is no more the limit than reading and decoding are."""

# Small on purpose: 50 senders of 2 MB are more than there is room for, and a 3 Mpx picture is the largest.
LIMITS = ServiceSettings(
    port=0, max_bytes=2_000_000, max_pixels=3_000_000, bodies_mb=32, pixels_mb=48, max_waiting=64, max_files=16
)
SETTINGS = DetectorSettings(service=LIMITS, client=ClientSettings())

# What a process holds beside the settings' bounds: a batch whose askers left, what python and malloc keep of what they
# gave back, connections (64 KB each way), and decoders' own tables.
SLACK_MB = 96


def bound_mb(settings: ServiceSettings) -> float:
    """How far the service's memory may rise above what it is at rest, MB."""
    return settings.bodies_mb + settings.pixels_mb + SLACK_MB


# A request that was answered 429 is sent again, and one that was cut: a refused body is read for 2 s more, so that its
# sender sees the answer, and then no longer (`streams.serving.LINGER_S`). Cut ones are counted as this status.
_CUT = 299
_TRIES = 100


class SleepingDetector(FakeDetector):
    """As the fake one, after a while."""

    name = "sleeper"

    def detect(self, images: Sequence[Image.Image]) -> list[tuple[Box, ...]]:
        """A person over each bright image."""
        time.sleep(SLEEP_S)
        return super().detect(images)


class Case(NamedTuple):
    """One request, and whether an answer to it is right."""

    kind: str
    send: Callable[[httpx.AsyncClient], Any]
    right: Callable[[httpx.Response], bool]


class Report(NamedTuple):
    """What came of a run."""

    statuses: Counter[str]
    wrong: list[str]
    again: int
    """Requests that were sent again: after a 429, or a cut."""
    at_rest_mb: float
    peak_mb: float
    seconds: float


def picture(size: tuple[int, int], *, bright: bool = True, kind: str = "JPEG") -> bytes:
    """One that the sleeping model sees a person in, or nobody."""
    out = io.BytesIO()
    Image.new("RGB", size, (255 if bright else 0,) * 3).save(out, kind)
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes that says it has so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 16)))
        + chunk(b"IEND", b"")
    )


def sees(result: dict[str, Any], size: tuple[int, int], *, bright: bool = True) -> bool:
    """Whether a result is the sleeping model's for such a picture."""
    found = [(d["class"], d["confidence"], d["bbox"]) for d in result["detections"]]
    box = {"x": 0, "y": 0, "width": size[0], "height": size[1]}
    return (result["image_width"], result["image_height"]) == size and found == (
        [("person", 0.9, box)] if bright else []
    )


def cases(rng: random.Random, limits: ServiceSettings, *, real: bool) -> Callable[[], Case]:
    """Makes requests at random; `real`: what the model sees is its own matter, that it answers is checked."""
    too_long = picture((8, 8)) + bytes(limits.max_bytes)
    bombs = [bomb(60_000, 60_000), bomb(1, limits.max_pixels + 1)]
    large_size = (2000, limits.max_pixels // 2000)
    large = picture(large_size)

    def right_of(size: tuple[int, int], bright: bool) -> Callable[[dict[str, Any]], bool]:
        def right(result: dict[str, Any]) -> bool:
            if real:
                return (result["image_width"], result["image_height"]) == size and len(result["model_digest"]) == 64
            return sees(result, size, bright=bright)

        return right

    def good() -> tuple[bytes, Callable[[dict[str, Any]], bool]]:
        size, bright = (rng.randint(1, 700), rng.randint(1, 500)), rng.random() < 0.7
        return picture(size, bright=bright, kind=rng.choice(["JPEG", "JPEG", "PNG"])), right_of(size, bright)

    def bad() -> bytes:
        return rng.choice(
            [b"", b"no picture", picture((99, 99))[:-60], picture((99, 99), kind="GIF"), rng.choice(bombs)]
        )

    def one() -> Case:
        data, right = good()
        if rng.random() < 0.25:
            body = {rng.choice(["image", "image_base64"]): base64.b64encode(data).decode()}
            return Case(
                "good base64",
                lambda http: http.post("/detect", json=body),
                lambda a: a.status_code == 200 and right(a.json()),
            )
        return Case(
            "good",
            lambda http: http.post("/detect", files={"file": ("a.jpg", data)}),
            lambda a: a.status_code == 200 and right(a.json()),
        )

    def several() -> Case:
        made: list[tuple[bytes, Callable[[dict[str, Any]], bool] | None]] = [
            (bad(), None) if rng.random() < 0.3 else good() for _ in range(rng.randint(1, 8))
        ]
        if rng.random() < 0.2:
            made[0] = (too_long, None)
        files = [("files", (f"{n}.jpg", data)) for n, (data, _) in enumerate(made)]

        def right(answer: httpx.Response) -> bool:
            if answer.status_code != 200:
                return False
            results = answer.json()["results"]
            return len(results) == len(made) and all(
                "error" in result if check is None else check(result)
                for result, (_, check) in zip(results, made, strict=True)
            )

        return Case("batch", lambda http: http.post("/detect/batch", files=files), right)

    def refused() -> Case:
        data = bad()
        send, status = rng.choice(
            [
                (lambda http: http.post("/detect", files={"file": ("a.jpg", data)}), 400),
                (lambda http: http.post("/detect", files={"picture": ("a.jpg", data)}), 400),
                (lambda http: http.post("/detect", content=data, headers={"content-type": "multipart/form-data"}), 400),
                (
                    lambda http: http.post(
                        "/detect",
                        content=b"--x\r\nnonsense",
                        headers={"content-type": "multipart/form-data; boundary=x"},
                    ),
                    400,
                ),
                (
                    lambda http: http.post(
                        "/detect", content=b'{"image":', headers={"content-type": "application/json"}
                    ),
                    400,
                ),
                (lambda http: http.post("/detect", json={"image": [[[1]]]}), 400),
                (lambda http: http.post("/detect", json={"image": "*"}), 400),
                (lambda http: http.post("/detect?min_confidence=nan", files={"file": ("a.jpg", data)}), 400),
                (lambda http: http.get("/detect"), 405),
                (lambda http: http.post("/nowhere", content=data), 404),
            ]
        )
        return Case("bad", send, lambda answer: answer.status_code == status)

    def huge() -> Case:
        if rng.random() < 0.4:
            return Case(
                "large",
                lambda http: http.post("/detect", files={"file": ("a.jpg", large)}),
                lambda a: a.status_code == 200 and right_of(large_size, True)(a.json()),
            )
        if rng.random() < 0.5:
            text = base64.b64encode(too_long).decode()
            return Case(
                "huge base64", lambda http: http.post("/detect", json={"image": text}), lambda a: a.status_code == 413
            )
        return Case(
            "huge",
            lambda http: http.post("/detect", files={"file": ("a.jpg", too_long)}),
            lambda a: a.status_code == 413,
        )

    def leaving() -> Case:
        data, _ = good()

        async def send(http: httpx.AsyncClient) -> httpx.Response:
            with contextlib.suppress(httpx.TimeoutException):
                return await http.post("/detect", files={"file": ("a.jpg", data)}, timeout=0.003)
            return httpx.Response(204)

        return Case("leaves", send, lambda answer: answer.status_code in {200, 204})

    kinds = [(one, 50), (several, 20), (refused, 20), (huge, 6), (leaving, 4)]
    makers, weights = [make for make, _ in kinds], [weight for _, weight in kinds]

    def any_of_them() -> Case:
        return rng.choices(makers, weights)[0]()

    return any_of_them


async def run(count: int, *, seed: int = 1, real: bool = False, settings: DetectorSettings = SETTINGS) -> Report:
    """Send so many requests, and say what came of them."""
    rng = random.Random(seed)
    make = cases(rng, settings.service, real=real)
    statuses: Counter[str] = Counter()
    wrong: list[str] = []
    again = 0
    async with serving(settings, real=real) as (url, pid):
        limits = httpx.Limits(max_connections=2 * AT_ONCE, max_keepalive_connections=AT_ONCE)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as http:
            await http.post("/detect", files={"file": ("a.jpg", picture((640, 360)))})
            at_rest = memory_mb(pid, "VmRSS")
            left = count
            began = time.perf_counter()

            async def sender() -> None:
                nonlocal left, again
                while left > 0:
                    left -= 1
                    case = make()
                    for _ in range(_TRIES):
                        try:
                            answer = await case.send(http)
                        except httpx.TransportError as error:
                            answer = httpx.Response(_CUT, text=repr(error))
                        statuses[f"{case.kind} {answer.status_code}"] += 1
                        if answer.status_code not in {429, _CUT}:
                            break
                        again += 1
                        await asyncio.sleep(rng.uniform(0.02, 0.2))  # a test has no second
                    if not case.right(answer):
                        wrong.append(f"{case.kind}: {answer.status_code} {answer.text[:200]}")

            async with asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(sender())
            took = time.perf_counter() - began
            health = await http.get("/health")
            if health.status_code != 200:
                wrong.append(f"health: {health.text}")
            told = (await http.get("/metrics")).text
            wrong += [
                line
                for line in told.splitlines()
                if line.startswith(("rewatch_detector_in_hand ", "rewatch_detector_memory_bytes{"))
                and not line.endswith(" 0.0")
            ]
            peak = memory_mb(pid, "VmHWM")
    return Report(statuses, wrong, again, at_rest, peak, took)


def memory_mb(pid: int, what: str) -> float:
    """What Linux tells of a process: VmRSS now, VmHWM its peak."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(what))


@asynccontextmanager
async def serving(settings: DetectorSettings, *, real: bool = False) -> AsyncIterator[tuple[str, int]]:
    """The service in a process of its own: its address and its process id."""
    told = ["--serve", json.dumps(settings.model_dump(mode="json", exclude={"api_key"})), *(["--real"] if real else [])]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.bench.service_load", *told, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        url = (await process.stdout.readline()).decode().strip()
        assert url, "it ended before it served"
        yield url, process.pid
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
    assert process.returncode == 0, process.returncode


async def serve(settings: DetectorSettings, *, real: bool) -> None:
    """Serve until SIGTERM; say where, when it is healthy."""
    logs.to_stderr("warning")
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    service = Service(demo if real else SleepingDetector, settings)
    running = asyncio.create_task(service.run(stop))
    warm = asyncio.create_task(service.warm.wait())
    await asyncio.wait({running, warm}, return_when=asyncio.FIRST_COMPLETED)
    warm.cancel()
    if not running.done():
        print(await service.url, flush=True)
    await running


def demo() -> Detector:
    """The demo's detector, by torch."""
    from infra import topology
    from infra.config import Settings

    return topology.detector(
        Settings(
            data_dir=Path(tempfile.gettempdir()) / "rewatch-service-load", detector=DetectorSettings(runtime="torch")
        )
    )


def main() -> None:
    """Run it, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--real", action="store_true", help="the demo's detector instead of one that sleeps")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(DetectorSettings.model_validate_json(arguments.serve), real=arguments.real))
        return
    report = asyncio.run(run(arguments.requests, seed=arguments.seed, real=arguments.real))
    for name, count in sorted(report.statuses.items()):
        print(f"{count:7,}  {name}")
    print(f"{report.again:,} sent again; wrong: {len(report.wrong)} {report.wrong[:5]}")
    print(f"{arguments.requests / report.seconds:.0f} requests/s, {report.seconds:.0f} s")
    bound = report.at_rest_mb + bound_mb(LIMITS)
    print(f"memory: {report.at_rest_mb:.0f} MB at rest, {report.peak_mb:.0f} MB at its peak, {bound:.0f} MB its bound")


if __name__ == "__main__":
    main()
