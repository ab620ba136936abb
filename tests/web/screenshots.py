"""Pictures of the live page for the README, and to look at after a change of its looks.

    python -m tests.web.screenshots http://127.0.0.1:8000 FOLDER

Phone and desk, light and dark, of a running service.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Literal, get_args

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tests.web.conftest import ARGUMENTS, find_chromium
from tests.web.pages import is_kept, shows_refined

Theme = Literal["light", "dark"]
SCREENS = {"desk": (1280, 800), "phone": (390, 844)}
PROMPTS = ("a sunflower on a blue background", "a panda on a yellow background", "a fox on a green background")
SEED = 12
WIDTH = 960


def main(url: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(playwright), args=ARGUMENTS)
        for screen, theme in itertools.product(SCREENS, get_args(Theme)):
            path = folder / f"page-{screen}-{theme}.png"
            take(browser, url, screen, theme, path)
            shrink(path)
        browser.close()


def take(browser: Browser, url: str, screen: str, theme: Theme, path: Path) -> None:
    width, height = SCREENS[screen]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=theme, device_scale_factor=1.5
    )
    page = context.new_page()
    page.goto(f"{url}/#seed={SEED}")
    page.wait_for_selector("#ideas-list button")
    for count, prompt in enumerate(PROMPTS, start=1):
        type_over(page, prompt)
        is_kept(page, count)
    page.screenshot(path=path)
    context.close()


def type_over(page: Page, prompt: str) -> None:
    page.locator("#prompt").fill("")
    page.keyboard.type(prompt, delay=200)
    shows_refined(page, prompt)


def shrink(path: Path) -> None:
    """To a WebP that a README can carry."""
    with Image.open(path) as picture:
        picture.thumbnail((WIDTH, WIDTH))
        picture.save(path.with_suffix(".webp"), quality=86, method=6)
    path.unlink()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
