"""Services that are asked by us lead us nowhere else, and another LLM is not given this installation's key."""

import asyncio
import contextlib
import io
from collections.abc import Awaitable, Callable

import pytest
from PIL import Image
from starlette.responses import RedirectResponse, Response

from infra.config import load
from infra.replaying import server
from processors.analyze.llm import OpenAiLlm
from processors.analyze.settings import LlmSettings
from processors.detect.http_detector import HttpDetector
from processors.detect.settings import ClientSettings, DetectorSettings
from processors.gateway.settings import GatewaySettings
from processors.gateway.upload import Uploads
from processors.replay.plan import Llm
from streams.errors import UnavailableError
from tests.processors.camera_kit import camera
from tests.processors.gateway_kit import client_of
from tests.processors.test_detect import jpeg
from tests.processors.test_gateway_api import FakeSource, build_app

KEY = "correct horse battery staple"


async def detects(url: str) -> None:
    section = DetectorSettings.model_validate({"url": url, "api_key": KEY, "client": ClientSettings(retries=0)})
    asks = HttpDetector(section)
    try:
        with pytest.raises(UnavailableError, match=r"30[78]"):
            await asyncio.to_thread(asks.detect, [Image.open(io.BytesIO(jpeg()))])
    finally:
        asks.close()


async def judges(url: str) -> None:
    llm = OpenAiLlm(LlmSettings.model_validate({"url": url, "api_key": KEY}))
    try:
        with pytest.raises(UnavailableError):
            await llm.server()
    finally:
        await llm.close()


async def uploads(url: str) -> None:
    way = Uploads(url, key=KEY, at_once=1, timeout_s=5)
    async with client_of(build_app(FakeSource(), GatewaySettings(), way)) as client:
        answer = await client.post("/api/upload?camera=front", content=b"x")
        assert (answer.status_code, "location" in answer.headers) == (307, False)
    await way.close()


@pytest.mark.parametrize("asks", [detects, judges, uploads], ids=lambda asks: asks.__name__)
async def test_a_service_that_redirects_is_not_followed(asks: Callable[[str], Awaitable[None]]) -> None:
    async with camera() as elsewhere, camera() as service:
        service.says(lambda request: RedirectResponse(f"{elsewhere.url}{request.url.path}", 307))
        await asks(service.url)
        assert service.asked
        assert elsewhere.asked == []


async def test_an_llm_that_a_replay_names_is_not_given_the_key_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay's plan is a record: its address is asked, with nothing of ours in the request."""
    monkeypatch.setenv("NEMOTRON_API_KEY", KEY)
    async with camera() as named:
        named.says(Response(status_code=404))
        with contextlib.suppress(UnavailableError):
            await server(load(), Llm(url=named.url, model="", model_path=""))
        assert named.asked
        assert KEY not in repr([request.headers for request in named.asked])
        ours = OpenAiLlm(LlmSettings.model_validate({"url": named.url, "api_key": KEY}))
        with contextlib.suppress(UnavailableError):
            await ours.server()
        await ours.close()
        assert KEY in repr(named.asked[-1].headers)
