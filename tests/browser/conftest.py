"""A headless Chromium of this machine's own, and sites for it to look at."""

import os
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Playwright, sync_playwright

from processors.gateway.fakes import FakeSource
from tests.browser import showcase
from tests.browser.site import Site

# Everything is on this machine: what takes longer is broken.
PATIENCE_MS = 15_000

# Says of each refused script, style or picture what it was.
_WATCH = """
window.refused = [];
addEventListener("securitypolicyviolation", (event) => {
  refused.push(`${event.violatedDirective} ${event.blockedURI} ${event.sourceFile ?? ""}:${event.lineNumber}`);
});
"""


class Visitor(NamedTuple):
    """A page, and what went wrong on it besides."""

    page: Page
    errors: list[str]

    def refused(self) -> list[str]:
        """What the content security policy refused on the page as it is now."""
        found: list[str] = self.page.evaluate("window.refused")
        return found


def chromium_path() -> str:
    """This machine's Chromium; where it has none the test is skipped, or fails under CI."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        reason = "no Chromium on PATH: install the package chromium (Debian, Ubuntu, Fedora) to run these"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


# Not for the whole session: Playwright's loop runs in this thread for as long, and async tests need it themselves.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    path = chromium_path()
    with sync_playwright() as playwright:
        yield from _launched(playwright, path)


def _launched(playwright: Playwright, path: str) -> Iterator[Browser]:
    # Containers give Chromium neither a sandbox nor a large /dev/shm; it sees nothing but this machine.
    browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def day() -> showcase.Day:
    """Footage is rendered once."""
    return showcase.make(most=4)


@pytest.fixture
def site(day: showcase.Day) -> Iterator[Site]:
    with Site(showcase.source(day)) as served:
        served.run(showcase.label(served.source, day))
        yield served


@pytest.fixture
def bare() -> Iterator[Site]:
    """An installation on its first day."""
    with Site(FakeSource()) as served:
        yield served


@pytest.fixture
def contexts(chromium: Browser) -> Iterator[list[BrowserContext]]:
    made: list[BrowserContext] = []
    yield made
    for context in made:
        context.close()


@pytest.fixture
def visit(chromium: Browser, contexts: list[BrowserContext]):
    """Makes visitors: `visit(width=..., java_script_enabled=..., ...)`, as Playwright's contexts are made."""

    def make(width: int = 1280, height: int = 900, **more) -> Visitor:
        context = chromium.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce", **more)
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        context.add_init_script(_WATCH)
        page = context.new_page()
        errors: list[str] = []

        def heard(message: ConsoleMessage) -> None:
            if message.type in {"error", "warning"}:
                errors.append(message.text)

        page.on("console", heard)
        page.on("pageerror", lambda error: errors.append(str(error)))
        return Visitor(page, errors)

    return make
