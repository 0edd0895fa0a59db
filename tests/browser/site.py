"""The gateway's app with the fake source, behind a real socket.

`python -m tests.browser.site [PORT]` shows it to you, with an event of the day coming in anew every ten seconds.
"""

import asyncio
import sys
import threading
import time
from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import Any, Self, TypeVar

import uvicorn

from processors.gateway.app import build_app
from processors.gateway.fakes import FakeSource
from processors.gateway.models import EventDetail
from processors.gateway.settings import GatewaySettings
from processors.gateway.upload import Uploads
from tests.browser import showcase

T = TypeVar("T")


class Site:
    """The app served from a thread of its own, on a free port."""

    def __init__(self, source: FakeSource, settings: GatewaySettings | None = None, port: int = 0) -> None:
        self.source = source
        uploads = Uploads("http://127.0.0.1:9", at_once=1, timeout_s=1)
        app = build_app(source, settings or GatewaySettings(), uploads)
        config = uvicorn.Config(app, port=port, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        deadline = time.monotonic() + 10
        while not self._server.started:
            assert time.monotonic() < deadline, "the site did not start"
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self.source.end())
        self._server.should_exit = True
        self._thread.join(10)
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Something done in the app's own loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(5)

    def add(self, event: EventDetail) -> None:
        """An event comes in."""
        self.run(self.source.add(event))

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._server.serve())


def again(event: EventDetail, number: int, **changes: object) -> EventDetail:
    """The same as a new event of now."""
    now = datetime.now(UTC)
    renewed = {
        "event_id": f"{event.camera_id}:{number:032x}:live",
        "started_at": now - (event.ended_at - event.started_at),
        "ended_at": now,
        "judged_at": now,
        "label": None,
        "labels": (),
    }
    return event.model_copy(update=renewed | changes)


def main() -> None:
    """Serve until stopped."""
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8081
    made = showcase.make(most=12)
    with Site(showcase.source(made), port=port) as site:
        site.run(showcase.label(site.source, made))
        print(site.url)
        number = 0
        while True:
            time.sleep(10)
            number += 1
            site.add(again(made.events[number % len(made.events)], number))


if __name__ == "__main__":
    main()
