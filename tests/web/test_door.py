"""The live page of a service that asks for keys, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.web.test_live_token import Gateway, start_gateway

gateway = start_gateway
TTL_S = 10


@pytest.fixture
def page(browser: Browser, gateway: Gateway) -> Iterator[Page]:
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{gateway.port}/#prompt=tree&seed=7")
    yield page
    context.close()


def enter(page: Page, credential: str) -> None:
    page.get_by_label("Live token or key").fill(credential)
    page.get_by_role("button", name="Draw with it").click()


def test_it_says_that_a_key_is_needed_and_why_it_has_none(page: Page) -> None:
    expect(page.get_by_role("heading", name="This service asks for a key")).to_be_visible()
    expect(page.locator("#door")).to_contain_text("this one holds no key")
    expect(page.get_by_label("Live token or key")).to_be_focused()
    expect(page.locator("#prompt")).to_be_hidden()


def test_a_key_opens_it_and_is_kept_in_this_tab_only(page: Page, gateway: Gateway) -> None:
    enter(page, gateway.key)
    expect(page.locator("#connection")).to_have_text("Live")
    expect(page.get_by_label("Steps")).to_be_visible()
    expect(page.locator("#seed")).to_have_value("7")
    expect(page.locator("#message")).to_have_text("No worker is ready yet. Drawing begins as soon as one is.")
    assert gateway.key not in page.url
    assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_role("heading", name="This service asks for a key")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


def test_a_live_token_opens_the_socket_without_the_list_of_models(page: Page, gateway: Gateway) -> None:
    token = gateway.make_token(f"http://127.0.0.1:{gateway.port}", TTL_S).json()["token"]
    enter(page, token)
    expect(page.locator("#connection")).to_have_text("Live")
    expect(page.get_by_label("Steps")).to_be_hidden()
    expect(page.locator("#message")).to_contain_text("No worker has the model loaded right now.")
    expect(page.locator("#door-reason")).to_have_text("The service says: the live token has expired")
    assert page.evaluate("sessionStorage.length") == 0


@pytest.mark.parametrize(
    ("credential", "reason"),
    [("fs_aaaaaaaaaaaa_wrong", "The service doesn't know this key."), ("nonsense", "The service says: ")],
)
def test_a_wrong_one_is_forgotten_and_the_reason_told(page: Page, credential: str, reason: str) -> None:
    enter(page, credential)
    expect(page.locator("#door-reason")).to_contain_text(reason)
    assert page.evaluate("sessionStorage.length") == 0


@pytest.mark.parametrize("credential", ["fs_aaaaaaaaaaaa_…", "two words"])
def test_what_no_handshake_carries_is_refused_at_once(page: Page, credential: str) -> None:
    enter(page, credential)
    expect(page.locator("#door-reason")).to_contain_text("That is no key or token")
    expect(page.get_by_label("Live token or key")).to_be_focused()
    assert page.evaluate("sessionStorage.length") == 0
