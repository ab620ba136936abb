"""The live page while the gateway restarts, in a real browser."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser, expect

from tests.service import Service
from tests.web.pages import PROMPT, shows_refined

pytestmark = pytest.mark.xdist_group("service")


def test_it_comes_back_by_itself_and_draws_what_was_typed_meanwhile(browser: Browser, service: Service) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(service.url)
    expect(page.locator("#connection")).to_have_text("Live")
    page.locator("#prompt").fill("a red heart on a white background")
    shows_refined(page, "a red heart on a white background")
    service.child("gateway").terminate()
    expect(page.locator("#connection")).to_have_text("Reconnecting")
    page.locator("#prompt").fill(PROMPT)
    shows_refined(page, PROMPT)
    expect(page.locator("#connection")).to_have_text("Live")
    expect(page.locator("#message")).to_have_text("")
    context.close()
