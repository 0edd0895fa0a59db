"""A detector and an LLM that only sleep: `python -m tests.bench.sleeping_models PORT`. For `latency.py`.

Both speak the protocols that the product's clients speak, answer what closes a window by the fast path and a valid
verdict, and number their requests: the detector's box lies at x = number, the verdict's summary is the number. What
each request really took, from its first byte in the handler to its answer, is told on `/took`, so that it can be
taken off a frame's time exactly.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

DETECT_S = 0.050
"""About what RT-DETRv2 R50 takes on a small GPU (design's facts: 51.8 ms for R18 on a V100 in PyTorch)."""
JUDGE_S = 0.150
"""Short, so that windows rarely wait for a slot of the LLM: waiting there is not the road's time."""

MODEL = "sleeper"


class Took:
    """What each request of one model took, milliseconds, by its number."""

    def __init__(self) -> None:
        self.ms: list[float] = []

    async def time(self, work: Callable[[int], Awaitable[Any]]) -> Response:
        """Do a request's work, given its number, and answer with its result."""
        began = time.perf_counter()
        number = len(self.ms)
        self.ms.append(0.0)
        answer = JSONResponse(await work(number))
        self.ms[number] = (time.perf_counter() - began) * 1000
        return answer


def build_app() -> Starlette:
    """The ASGI app of both models."""
    detector, llm = Took(), Took()

    async def detect(request: Request) -> Response:
        async def work(number: int) -> dict[str, Any]:
            async with request.form() as form:
                images = len(form.getlist("files"))
            await asyncio.sleep(DETECT_S)
            return {"results": [{"detections": [_person(number)]} for _ in range(images)]}

        return await detector.time(work)

    async def chat(request: Request) -> Response:
        async def work(number: int) -> dict[str, Any]:
            await request.body()
            await asyncio.sleep(JUDGE_S)
            return _completion(number)

        return await llm.time(work)

    async def models(_: Request) -> Response:
        return JSONResponse({"data": [{"id": MODEL}]})

    async def took(_: Request) -> Response:
        return JSONResponse({"detector": detector.ms, "llm": llm.ms})

    return Starlette(
        routes=[
            Route("/detect/batch", detect, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/took", took),
        ]
    )


def _person(number: int) -> dict[str, Any]:
    """Surer than the fast path asks for, and never twice in one place, so never stationary."""
    return {
        "class": "person",
        "confidence": 0.95,
        "bbox": {"x": number, "y": 100, "width": 1, "height": 100},
    }


def _completion(number: int) -> dict[str, Any]:
    verdict = {
        "reasoning": "somebody is there",
        "risk_factors": [],
        "entities": ["1 person"],
        "summary": str(number),
        "recommended_action": "none",
        "risk_score": 20,
    }
    message = {"role": "assistant", "content": json.dumps(verdict)}
    return {
        "model": MODEL,
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 50},
    }


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("port", type=int)
    uvicorn.run(build_app(), port=parser.parse_args().port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
