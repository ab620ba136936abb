"""A page of another site that draws with tokens of its own backend, in a real browser."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page

from app.access.key_file import add_key, make_key, new_record, remove_key
from app.routes.page import WEB_PATH
from tests.service import free_port, spawn

TTL_S = 3
START_S = 60


class Gateway:
    """A gateway that asks for keys, and one key of it."""

    def __init__(self, folder: Path, redis_url: str) -> None:
        self.port, self.keys_path = free_port(), folder / "keys.toml"
        self.key_id, self.key = make_key()
        add_key(self.keys_path, new_record(self.key), self.key_id)
        self.process = spawn(
            "gateway",
            log=folder / "gateway.log",
            FEWSTEP_PORT=str(self.port),
            FEWSTEP_REDIS_URL=redis_url,
            FEWSTEP_REDIS_PREFIX=folder.name,
            FEWSTEP_API_KEYS_FILE=str(self.keys_path),
        )

    def wait_until_alive(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/livez").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError("the gateway didn't start")

    def make_token(self, origin: str, ttl_s: int = TTL_S) -> httpx.Response:
        body = {"origin": origin, "ttl_s": ttl_s}
        url = f"http://127.0.0.1:{self.port}/v1/live/tokens"
        return httpx.post(url, json=body, headers={"Authorization": f"Bearer {self.key}"})


class Shop(SimpleHTTPRequestHandler):
    """The other site: its page carries live.js, its backend holds the key."""

    def __init__(self, *arguments: object, gateway: Gateway) -> None:
        self.gateway = gateway
        super().__init__(*arguments, directory=str(WEB_PATH))  # type: ignore[arg-type]

    def do_POST(self) -> None:
        answer = self.gateway.make_token(f"http://{self.headers['Host']}")
        self.send_response(answer.status_code)
        self.end_headers()
        self.wfile.write(answer.json().get("token", "").encode())

    def do_GET(self) -> None:
        if self.path != "/":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><link rel=icon href=data:,><title>shop</title>")
        return None

    def log_message(self, format: str, *arguments: object) -> None:
        """Quietly."""


CONNECT = """async (url) => {
  const { LiveClient } = await import("/live.js");
  window.seen = [];
  const token = async () => {
    const answer = await fetch("/token", { method: "POST" });
    if (!answer.ok) throw new Error(answer.status);
    return answer.text();
  };
  window.live = new LiveClient(url, { token });
  live.on("state", ({ state }) => seen.push(state));
  live.on("authenticated", () => seen.push("authenticated"));
  live.connect();
}"""


@pytest.fixture(scope="module", name="gateway")
def start_gateway(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path_factory.mktemp("gateway"), redis_url)
    try:
        gateway.wait_until_alive()
        yield gateway
    finally:
        gateway.process.terminate()
        gateway.process.wait(20)


@pytest.fixture
def page(browser: Browser, gateway: Gateway) -> Iterator[Page]:
    """A page of the shop whose client is connecting."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Shop, gateway=gateway)) as shop:
        thread = threading.Thread(target=shop.serve_forever)
        thread.start()
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{shop.server_address[1]}/")
        page.evaluate(CONNECT, f"ws://127.0.0.1:{gateway.port}/v1/live")
        yield page
        context.close()
        shop.shutdown()
        thread.join()


def test_a_page_elsewhere_stays_live_beyond_the_end_of_its_token(page: Page) -> None:
    page.wait_for_function("seen.filter((what) => what === 'authenticated').length >= 2")
    assert page.evaluate("seen.slice(0, 4)") == ["connecting", "live", "authenticated", "authenticated"]


def test_a_client_that_misses_its_refresh_comes_back_with_a_new_token(page: Page) -> None:
    page.wait_for_function("live.state === 'live'")
    page.route("**/token", lambda route: route.abort())
    page.wait_for_function("live.state === 'waiting'")
    page.unroute("**/token")
    page.wait_for_function("live.state === 'live'")


def test_a_closed_client_asks_for_no_more_tokens(page: Page) -> None:
    page.wait_for_function("live.state === 'live'")
    page.evaluate("live.close()")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(TTL_S * 1000)
    assert (asked, page.evaluate("live.state")) == ([], "closed")


def test_no_page_of_another_origin_can_use_the_token(page: Page, gateway: Gateway) -> None:
    stolen = gateway.make_token("http://elsewhere.example").json()["token"]
    page.evaluate(
        """async ([url, token]) => {
          const { LiveClient } = await import("/live.js");
          window.thief = new LiveClient(url, { token: () => token });
          thief.on("state", (state) => (window.last = state));
          thief.connect();
        }""",
        [f"ws://127.0.0.1:{gateway.port}/v1/live", stolen],
    )
    page.wait_for_function("thief.state === 'closed'")
    assert page.evaluate("last.reason") == "the live token is for pages of http://elsewhere.example"


def test_a_revoked_key_ends_the_pages_it_had_let_in(page: Page, gateway: Gateway) -> None:
    page.wait_for_function("live.state === 'live'")
    record = remove_key(gateway.keys_path, gateway.key_id)
    try:
        page.wait_for_function("live.state === 'waiting'")
    finally:
        add_key(gateway.keys_path, record, gateway.key_id)
    page.wait_for_function("live.state === 'live'")
