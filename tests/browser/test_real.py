"""The pages over the real source: the real Kafka, the real ClickHouse engine, a real browser."""

import time

import pytest
from playwright.async_api import async_playwright, expect

from infra.config import Settings
from processors.gateway.app import build_app
from processors.gateway.settings import GatewaySettings
from processors.gateway.upload import Uploads
from processors.gateway.words import local_date
from tests import examples
from tests.browser.conftest import PATIENCE_MS, chromium_path
from tests.processors import gateway_kit as kit

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="session")]

expect.set_options(timeout=PATIENCE_MS)


async def test_an_event_comes_live_shows_its_frames_and_takes_a_label(settings: Settings) -> None:
    path = chromium_path()
    settings = kit.own_database(settings)
    at = (int(time.time()) // 3600 - 1) * 3_600_000  # a full hour: both windows are of one day
    first, second = kit.window("front", at), kit.window("front", at + 60_000, score=97)
    await kit.store(settings, [kit.camera("front", at=at - 1), *first])
    day = local_date(kit.moment(at), examples.camera.time_zone)
    uploads = Uploads("http://127.0.0.1:9", at_once=1, timeout_s=1)
    async with (
        kit.source_of(settings) as source,
        kit.served(build_app(source, GatewaySettings(), uploads)) as url,
        async_playwright() as playwright,
    ):
        browser = await playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        page = await browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        await page.goto(url)
        await expect(page.locator("#live")).to_have_attribute("data-state", "live")
        await expect(page.locator("[data-event]")).to_have_count(1)
        await kit.store(settings, second, start=100)
        await expect(page.locator("[data-event]")).to_have_count(2)
        await expect(page.locator("[data-event]").first).to_contain_text("97 critical")

        await page.goto(f"{url}/events/{kit.event_id(second)}")
        picture = page.locator("#stage figure:visible img")
        await expect(picture).to_have_js_property("complete", value=True)
        assert await picture.evaluate("img => img.naturalWidth") > 0
        await expect(page.locator("#stage figure:visible .matters").first).to_be_visible()
        await page.keyboard.press("f")
        await expect(page.locator(".given")).to_contain_text("false alarm")
        await expect(page.locator(".labels")).to_contain_text("false alarm")

        await page.goto(f"{url}/cameras/front?day={day}")
        await expect(page.locator(".event-mark")).to_have_count(2)
        await page.goto(f"{url}/pipeline")
        await expect(page.locator("tbody tr").first).to_contain_text("detect")
        assert errors == []
        # The stream ends with its reader: nothing keeps the server from stopping.
        await browser.close()
        await source.feed.close()
