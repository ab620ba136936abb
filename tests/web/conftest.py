"""A real browser for the live page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NoReturn

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Playwright, expect, sync_playwright

CHROMIUM_VARIABLE = "PLAYWRIGHT_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TIMEOUT_MS = 30_000
expect.set_options(timeout=TIMEOUT_MS)

# Runs in the page before its own scripts; what it sees is in `window.seen`. `urls` and `bitmaps` are those that nobody
# has released yet.
WITNESS = """
window.seen = { violations: [], shifts: [], pictures: [], urls: 0, bitmaps: 0 };
const { createObjectURL, revokeObjectURL } = URL;
URL.createObjectURL = (blob) => (seen.urls++, createObjectURL(blob));
URL.revokeObjectURL = (url) => (seen.urls--, revokeObjectURL(url));
const { createImageBitmap: decode } = window;
const { close } = ImageBitmap.prototype;
window.createImageBitmap = async (blob) => (seen.bitmaps++, decode(blob));
ImageBitmap.prototype.close = function () { seen.bitmaps--; close.call(this); };
addEventListener("securitypolicyviolation", (event) => seen.violations.push(event.violatedDirective));
new PerformanceObserver((list) => seen.shifts.push(...list.getEntries().map((entry) => entry.value)))
  .observe({ type: "layout-shift", buffered: true });
addEventListener("DOMContentLoaded", () => {
  const stage = document.getElementById("stage");
  if (!stage) return;
  const note = () => seen.pictures.push([stage.dataset.state, Number(stage.dataset.seq)]);
  new MutationObserver(note).observe(stage, { attributes: true, attributeFilter: ["data-state", "data-seq"] });
});
"""

OpenPage = Callable[..., Page]


@pytest.fixture(scope="module")  # while it is open, no test with an event loop can run in this process
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(playwright), args=ARGUMENTS)
        yield browser
        browser.close()


def find_chromium(playwright: Playwright) -> str:
    """Named by a variable, on PATH, or downloaded by `playwright install chromium`."""
    candidates = [os.environ.get(CHROMIUM_VARIABLE), *map(shutil.which, NAMES), playwright.chromium.executable_path]
    found = next((candidate for candidate in candidates if candidate and Path(candidate).exists()), None)
    return found or give_up(f"no Chromium: put one on PATH, name it in {CHROMIUM_VARIABLE}, or `playwright install` it")


def give_up(reason: str) -> NoReturn:
    """A missing browser may not go unnoticed where nobody reads the list of skipped tests."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(f"THE LIVE PAGE WAS NOT TESTED: {reason}")


@pytest.fixture
def open_page(browser: Browser, service_url: str) -> Iterator[OpenPage]:
    """Opens the live page, by default on a desk's screen; afterwards nothing may have gone wrong in it.

    `state` is what stands behind the `#` of its URL.
    """
    contexts: list[BrowserContext] = []
    problems: list[str] = []

    def open_it(
        prepare: Callable[[Page], None] | None = None,
        width: int = 1280,
        height: int = 800,
        theme: Literal["light", "dark"] = "light",
        state: str = "",
    ) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
        contexts.append(context)
        context.set_default_timeout(TIMEOUT_MS)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("response", lambda response: problems.append(response.url) if response.status >= 400 else None)
        page.add_init_script(WITNESS)
        if prepare is not None:
            prepare(page)
        page.goto(f"{service_url}/{state}")
        page.wait_for_selector('#connection[data-state="live"]')
        page.wait_for_selector("#ideas-list button")
        return page

    yield open_it
    for context in contexts:
        problems += [
            violation for page in context.pages for violation in page.evaluate("window.seen?.violations ?? []")
        ]
        context.close()
    assert problems == []
