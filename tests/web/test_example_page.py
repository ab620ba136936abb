"""docs/examples/live_page.html in a real browser, beside live.js and on the service's origin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from app.routes.page import WEB_PATH

pytestmark = pytest.mark.xdist_group("service")
EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "live_page.html"


@pytest.fixture
def page(browser: Browser, service_url: str) -> Iterator[Page]:
    """Live, and without a word on its console.

    The document is the service's own, with other content: a page that a test answers itself may not open sockets.
    """
    context = browser.new_context()
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.route("**/live.js", lambda route: route.fulfill(path=WEB_PATH / "live.js"))
    page.goto(f"{service_url}/livez")
    page.set_content(EXAMPLE.read_text(encoding="utf-8"))
    page.wait_for_function("document.getElementById('status').textContent === 'live'")
    yield page
    context.close()
    assert problems == []


def test_typing_shows_pictures_and_the_last_is_a_final(page: Page) -> None:
    page.get_by_label("Prompt").press_sequentially("a red apple on a blue background")
    page.wait_for_function("document.getElementById('picture').dataset.type === 'final'")
    assert page.evaluate("document.getElementById('picture').naturalWidth") == 64


def test_what_is_refused_is_told(page: Page) -> None:
    page.evaluate("document.getElementById('prompt').removeAttribute('maxlength')")
    page.get_by_label("Prompt").fill("a" * 40_000)
    page.wait_for_function("document.getElementById('status').textContent.includes('prompt')")
