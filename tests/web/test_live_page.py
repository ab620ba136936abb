"""The live page in a real browser: against the real service, and against a socket that misbehaves on purpose."""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, WebSocketRoute, expect

from tests.web.conftest import TIMEOUT_MS, OpenPage

pytestmark = pytest.mark.xdist_group("service")
PROMPT = "a red apple on a blue background"
LIVE_URL = re.compile(r"/v1/live$")

expect.set_options(timeout=TIMEOUT_MS)


def shows_final(page: Page, prompt: str) -> None:
    expect(page.locator("#picture")).to_have_attribute("aria-label", prompt)
    expect(page.locator("#stage")).to_have_attribute("data-state", "final")


def mean_color(page: Page) -> list[int]:
    """Of the picture as it is on the page."""
    color: list[int] = page.evaluate(
        """() => {
          const canvas = document.getElementById("picture");
          const { width, height } = canvas;
          const { data } = canvas.getContext("2d").getImageData(width / 2, height / 2, 1, 1);
          return [...data.slice(0, 3)];
        }"""
    )
    return color


# Against the real service


def test_the_words_have_the_focus(open_page: OpenPage) -> None:
    expect(open_page().locator("#prompt")).to_be_focused()


def test_typing_gives_previews_and_then_the_picture(open_page: OpenPage) -> None:
    page = open_page()
    page.keyboard.insert_text(PROMPT)
    shows_final(page, PROMPT)
    pictures = page.evaluate("seen.pictures")
    assert ["preview", 1] in pictures
    assert pictures[-1] == ["final", 1]


def test_the_latency_and_its_stages_are_shown(open_page: OpenPage) -> None:
    page = open_page()
    page.keyboard.insert_text(PROMPT)
    shows_final(page, PROMPT)
    stages = [float(text.removesuffix(" ms")) for text in page.locator("#stages dd").all_inner_texts()]
    latency_ms = float(page.locator("#latency").inner_text())
    assert latency_ms > 0
    assert len(stages) == 6
    assert 0 < sum(stages) <= latency_ms + len(stages)


def test_newer_words_take_over(open_page: OpenPage) -> None:
    frames: list[str | bytes] = []

    def listen(page: Page) -> None:
        page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: frames.append(frame)))

    page = open_page(listen)
    page.keyboard.type(PROMPT)
    shows_final(page, PROMPT)
    superseded = [frame for frame in frames if isinstance(frame, str) and json.loads(frame)["type"] == "superseded"]
    assert superseded
    seqs = [seq for _, seq in page.evaluate("seen.pictures")]
    assert seqs == sorted(seqs)
    assert seqs[-1] == len(PROMPT)


def test_an_idea_is_drawn_by_a_click(open_page: OpenPage) -> None:
    page = open_page()
    idea = page.locator("#ideas button").first
    words = idea.inner_text()
    idea.click()
    expect(page.locator("#prompt")).to_have_value(words)
    expect(page.locator("#prompt")).to_be_focused()
    shows_final(page, words)


def test_the_same_seed_gives_the_same_file_and_a_new_one_another(open_page: OpenPage) -> None:
    page = open_page()
    page.keyboard.insert_text(PROMPT)
    shows_final(page, PROMPT)
    first = downloaded(page)
    draw_again(page, lambda: page.locator("#prompt").press("Enter"))
    assert downloaded(page) == first
    draw_again(page, lambda: page.get_by_role("button", name="New seed").click())
    name, data = downloaded(page)
    assert name == f"a-red-apple-on-a-blue-background-{page.locator('#seed').input_value()}.png"
    assert data.startswith(b"\x89PNG")
    assert data != first[1]


def draw_again(page: Page, act: Callable[[], Any]) -> None:
    seq = int(page.locator("#stage").get_attribute("data-seq") or 0)
    act()
    expect(page.locator("#stage")).to_have_attribute("data-seq", str(seq + 1))
    expect(page.locator("#stage")).to_have_attribute("data-state", "final")


def downloaded(page: Page) -> tuple[str, bytes]:
    with page.expect_download() as waiting:
        page.locator("#download").click()
    return waiting.value.suggested_filename, waiting.value.path().read_bytes()


def test_nothing_moves_while_pictures_come(open_page: OpenPage) -> None:
    for width, height in ((1280, 800), (390, 844)):
        page = open_page(width=width, height=height)
        page.evaluate("seen.shifts.length = 0")
        page.keyboard.insert_text(PROMPT)
        shows_final(page, PROMPT)
        page.wait_for_timeout(100)
        assert sum(page.evaluate("seen.shifts")) < 0.001, "only figures and the bar of stages may change"


def test_a_phone_needs_no_sideways_scrolling(open_page: OpenPage) -> None:
    page = open_page(width=320, height=640)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_an_empty_box_asks_for_nothing(open_page: OpenPage) -> None:
    page = open_page()
    page.keyboard.insert_text("  ")
    page.wait_for_timeout(300)
    expect(page.locator("#stage")).to_have_attribute("data-state", "empty")
    expect(page.locator("#message")).to_have_text("")


# Against a socket of our own


class FakeServer:
    """Answers the page's socket by `answer(connection, message, socket)`; counts connections from 1."""

    def __init__(self, answer: Callable[[int, dict[str, Any], WebSocketRoute], None]) -> None:
        self.answer = answer
        self.num_connections = 0
        self.received: list[dict[str, Any]] = []

    def prepare(self, page: Page) -> None:
        page.route_web_socket(LIVE_URL, self.connect)

    def connect(self, socket: WebSocketRoute) -> None:
        self.num_connections += 1
        connection = self.num_connections

        def on_message(text: str | bytes) -> None:
            message = json.loads(text)
            self.received.append(message | {"connection": connection})
            if message["type"] == "generate":
                self.answer(connection, message, socket)

        socket.on_message(on_message)
        socket.send(json.dumps({"type": "ready", "seq": None, "request_id": None, "seed": 1}))


def picture(seq: int, frame: int, color: str, type: str = "final") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    header = {"type": type, "frame": frame, "seq": seq, "step": 4, "num_inference_steps": 4, "seed": 1, "format": "png"}
    encoded = json.dumps(header | {"timings": None}).encode()
    return struct.pack(">I", len(encoded)) + encoded + buffer.getvalue()


def error(seq: int, code: str, message: str, **more: object) -> str:
    body = {"message": message, "type": "x", "param": None, "code": code}
    return json.dumps({"type": "error", "seq": seq, "request_id": None, "error": body, **more})


def test_an_older_picture_never_replaces_a_newer_one(open_page: OpenPage) -> None:
    def answer(_: int, message: dict[str, Any], socket: WebSocketRoute) -> None:
        if message["seq"] == 2:
            socket.send(picture(2, 2, "lime"))
            socket.send(picture(1, 3, "red"))
            socket.send(picture(2, 1, "blue", type="preview"))

    server = FakeServer(answer)
    page = open_page(server.prepare)
    page.keyboard.insert_text("one")
    page.keyboard.insert_text(" two")
    expect(page.locator("#stage")).to_have_attribute("data-seq", "2")
    page.wait_for_timeout(300)
    assert mean_color(page) == [0, 255, 0]
    assert page.evaluate("seen.pictures.at(-1)") == ["final", 2]
    acks = {message["frame"] for message in server.received if message["type"] == "ack"}
    assert acks == {1, 2, 3}


def test_it_reconnects_and_asks_for_the_newest_words_again(open_page: OpenPage) -> None:
    def answer(connection: int, message: dict[str, Any], socket: WebSocketRoute) -> None:
        if connection == 1:
            socket.send(picture(message["seq"], 7, "red", type="preview"))
            socket.close(code=1012, reason='{"reconnect_in_ms": 1000}')
        else:
            socket.send(picture(message["seq"], 1, "lime"))

    server = FakeServer(answer)
    page = open_page(server.prepare)
    page.keyboard.insert_text("tree")
    expect(page.locator("#connection")).to_have_attribute("data-state", "waiting")
    expect(page.locator("#connection")).to_have_text("Reconnecting")
    shows_final(page, "tree")
    expect(page.locator("#connection")).to_have_text("Live")
    assert mean_color(page) == [0, 255, 0]
    assert server.num_connections == 2
    acks = [message["frame"] for message in server.received if message["type"] == "ack" and message["connection"] == 2]
    assert acks == [1]


def test_a_connection_closed_for_idleness_opens_with_the_next_words(open_page: OpenPage) -> None:
    def answer(connection: int, message: dict[str, Any], socket: WebSocketRoute) -> None:
        socket.send(picture(message["seq"], 1, "lime"))
        if connection == 1:
            socket.close(code=4408, reason="no message for too long")

    server = FakeServer(answer)
    page = open_page(server.prepare)
    page.keyboard.insert_text("tree")
    expect(page.locator("#connection")).to_have_attribute("data-state", "idle")
    page.keyboard.insert_text(" and sun")
    shows_final(page, "tree and sun")
    assert server.num_connections == 2


def test_a_full_queue_is_said_in_plain_words_and_tried_again(open_page: OpenPage) -> None:
    def answer(_: int, message: dict[str, Any], socket: WebSocketRoute) -> None:
        if message["seq"] == 1:
            socket.send(error(1, "queue_full", "the queue of x is full", retry_after_ms=1500))
        else:
            socket.send(picture(message["seq"], 1, "lime"))

    page = open_page(FakeServer(answer).prepare)
    page.keyboard.insert_text("tree")
    expect(page.locator("#message")).to_contain_text("Many people are drawing")
    shows_final(page, "tree")
    expect(page.locator("#message")).to_have_text("")


def test_a_rejected_prompt_is_explained_and_not_tried_again(open_page: OpenPage) -> None:
    def answer(_: int, message: dict[str, Any], socket: WebSocketRoute) -> None:
        socket.send(error(message["seq"], "text_too_long", "prompt: too long"))

    server = FakeServer(answer)
    page = open_page(server.prepare)
    page.keyboard.insert_text("tree")
    expect(page.locator("#message")).to_have_text("prompt: too long")
    expect(page.locator("#message")).to_have_attribute("data-mood", "bad")
    page.wait_for_timeout(1500)
    assert [message["type"] for message in server.received] == ["generate"]
