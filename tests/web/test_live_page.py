"""The live page in a real browser: against the real service, and against a socket that misbehaves on purpose."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, WebSocketRoute, expect

from fewstep_client.live import FINAL_CODES
from tests.web.conftest import OpenPage
from tests.web.pages import (
    PROMPT,
    FakeServer,
    assert_same_picture,
    downloaded,
    draw_again,
    error,
    picture,
    shows_color,
    shows_final,
    shows_refined,
)

pytestmark = pytest.mark.xdist_group("service")
NUM_FRAMES = 1000


# Against the real service


def test_the_words_have_the_focus(open_page: OpenPage) -> None:
    expect(open_page().locator("#prompt")).to_be_focused()


def test_typing_gives_previews_and_then_the_picture(open_page: OpenPage) -> None:
    page = open_page(state="#steps=20&refine=0")
    page.keyboard.insert_text(PROMPT)
    shows_final(page, PROMPT)
    pictures = page.evaluate("seen.pictures")
    assert ["preview", 1] in pictures
    assert pictures[-1] == ["final", 1]


def test_the_better_picture_of_the_same_seed_follows_a_pause(open_page: OpenPage, service_url: str) -> None:
    page = open_page(state="#seed=5&steps=6")
    page.keyboard.insert_text(PROMPT)
    shows_final(page, PROMPT)
    quick = downloaded(page)[1]
    shows_refined(page, PROMPT)
    better = downloaded(page)[1]
    assert better != quick
    assert_same_picture(better, drawn_alone(service_url, 6))
    assert page.locator("#seed").input_value() == "5"


def test_without_sharpening_every_picture_has_all_its_steps(open_page: OpenPage, service_url: str) -> None:
    page = open_page(state="#seed=5&steps=6")
    page.get_by_label("Sharpen when I pause").uncheck()
    page.locator("#prompt").focus()
    page.keyboard.insert_text(PROMPT)
    shows_final(page, PROMPT)
    assert_same_picture(downloaded(page)[1], drawn_alone(service_url, 6))


def drawn_alone(service_url: str, steps: int) -> bytes:
    """The picture of PROMPT with seed 5, as the HTTP API gives it."""
    body = {"prompt": PROMPT, "seed": 5, "num_inference_steps": steps}
    return httpx.post(f"{service_url}/v1/generations", json=body, headers={"Accept": "image/png"}, timeout=60).content


def test_the_latency_and_its_stages_are_shown(open_page: OpenPage) -> None:
    page = open_page(state="#refine=0")
    rate = told(page, "rate")
    page.keyboard.insert_text(PROMPT)
    shows_final(page, PROMPT)
    assert_stages_add_up(page, "Drawn in")
    latency_ms = page.locator("#latency").inner_text()
    assert float(latency_ms) > 0
    assert [page.locator(f"#final-{name}").inner_text() for name in ("p50", "p95")] == [latency_ms, latency_ms]
    assert float(page.locator("#first-p50").inner_text()) <= float(latency_ms)
    assert max(map(float, page.evaluate(rate))) > 0


def test_sharpening_answers_no_key_and_has_a_time_of_its_own(open_page: OpenPage) -> None:
    page = open_page()
    latency = told(page, "latency")
    page.keyboard.insert_text(PROMPT)
    shows_refined(page, PROMPT)
    assert_stages_add_up(page, "Sharpened in")
    assert len(page.evaluate(latency)) == 1


def assert_stages_add_up(page: Page, what: str) -> None:
    expect(page.locator("#drawn")).to_contain_text(what)
    total_ms = float(page.locator("#drawn").inner_text().removeprefix(what).removesuffix("ms"))
    stages = [float(text.removesuffix(" ms")) for text in page.locator("#stages dd").all_inner_texts()]
    assert len(stages) == 6
    assert 0 < sum(stages) <= total_ms + len(stages)


def test_newer_words_take_over(open_page: OpenPage) -> None:
    frames: list[str | bytes] = []

    def listen(page: Page) -> None:
        page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: frames.append(frame)))

    page = open_page(listen)
    page.keyboard.type(PROMPT)
    shows_final(page, PROMPT)
    superseded = [frame for frame in frames if isinstance(frame, str) and json.loads(frame)["type"] == "superseded"]
    assert superseded
    expect(page.locator("#superseded")).to_have_text(str(len(superseded)))
    seqs = [seq for _, seq in page.evaluate("seen.pictures")]
    assert seqs == sorted(seqs)
    assert seqs[-1] == len(PROMPT)


@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
def test_an_idea_is_drawn_by_a_click(open_page: OpenPage, size: tuple[int, int]) -> None:
    page = open_page(width=size[0], height=size[1])
    idea = page.locator("#ideas-list button").first
    expect(idea).to_be_in_viewport()  # without scrolling
    assert page.evaluate("scrollY") == 0
    words = idea.inner_text()
    idea.click()
    expect(page.locator("#prompt")).to_have_value(words)
    expect(page.locator("#prompt")).to_be_focused()
    shows_final(page, words)


def test_the_same_seed_gives_the_same_file_and_a_new_one_another(open_page: OpenPage) -> None:
    page = open_page()
    page.keyboard.insert_text(PROMPT)
    shows_refined(page, PROMPT)
    first = downloaded(page)
    draw_again(page, lambda: page.locator("#prompt").press("Enter"))
    assert downloaded(page) == first
    draw_again(page, lambda: page.get_by_role("button", name="New seed").click())
    name, data = downloaded(page)
    assert name == f"a-red-apple-on-a-blue-background-{page.locator('#seed').input_value()}.png"
    assert data.startswith(b"\x89PNG")
    assert data != first[1]


def test_nothing_moves_while_pictures_come(open_page: OpenPage) -> None:
    for width, height in ((1280, 800), (390, 844)):
        page = open_page(width=width, height=height)
        page.evaluate("seen.shifts.length = 0")
        page.keyboard.insert_text(PROMPT)
        shows_refined(page, PROMPT)
        expect(page.locator("#strip button")).to_have_count(1)
        assert sum(page.evaluate("seen.shifts")) < 0.001, "only figures may change"


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
    shows_color(page, [0, 255, 0])
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
    shows_color(page, [0, 255, 0])
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
    expect(page.locator("#message")).to_have_text("Not drawn. Prompt: too long.")
    expect(page.locator("#message")).to_have_attribute("data-mood", "bad")
    page.wait_for_timeout(1500)
    assert [message["type"] for message in server.received] == ["generate"]


def test_a_model_that_lost_its_worker_is_named(open_page: OpenPage) -> None:
    def answer(_: int, message: dict[str, Any], socket: WebSocketRoute) -> None:
        socket.send(error(message["seq"], "model_not_ready", "no live worker holds it", retry_after_ms=9000))

    page = open_page(FakeServer(answer).prepare)
    page.keyboard.insert_text("tree")
    words = "No worker has mini-lcm loaded right now. Trying again in 9 seconds."
    expect(page.locator("#message")).to_have_text(words)


@pytest.mark.parametrize(
    ("code", "words"), [(1013, "The service is full"), (1012, "The service restarts"), (4429, "Too many changes")]
)
def test_a_closed_connection_says_why_until_it_is_back(open_page: OpenPage, code: int, words: str) -> None:
    def answer(connection: int, message: dict[str, Any], socket: WebSocketRoute) -> None:
        if connection == 1:
            socket.close(code=code, reason='{"reconnect_in_ms": 2500}')
        else:
            socket.send(picture(message["seq"], 1, "lime"))

    page = open_page(FakeServer(answer).prepare)
    page.keyboard.insert_text("tree")
    expect(page.locator("#message")).to_contain_text(f"{words}")
    expect(page.locator("#message")).to_contain_text("Trying again in 3 seconds.")
    shows_final(page, "tree")
    expect(page.locator("#message")).to_have_text("")


@pytest.mark.parametrize("code", sorted(FINAL_CODES - {1002}))  # Chromium lets no test close with 1002
def test_codes_after_which_nothing_helps(open_page: OpenPage, code: int) -> None:
    server = FakeServer(lambda _1, _2, socket: socket.close(code=code, reason="no"))
    page = open_page(server.prepare)
    page.keyboard.insert_text("tree")
    expect(page.locator("#connection")).to_have_text("Disconnected")
    expect(page.locator("#message")).to_have_text("The service closed the connection: No.")
    page.wait_for_timeout(500)
    assert server.num_connections == 1


def test_an_outage_is_told_once_and_not_at_every_try(open_page: OpenPage) -> None:
    def answer(connection: int, _: dict[str, Any], socket: WebSocketRoute) -> None:
        if connection < 4:
            socket.close(code=4430, reason="")
        else:
            socket.send(picture(1, 1, "lime"))

    page = open_page(FakeServer(answer).prepare)
    notes = [told(page, name) for name in ("connection", "message")]
    page.keyboard.insert_text("tree")
    shows_final(page, "tree")
    expect(page.locator("#message")).to_have_text("")
    assert [page.evaluate(note) for note in notes] == [
        ["Reconnecting", "Live"] * 3,
        ["The connection is gone. Trying again…", ""] * 3,
    ]


def test_a_full_queue_is_told_once_and_not_at_every_try(open_page: OpenPage) -> None:
    def answer(_: int, message: dict[str, Any], socket: WebSocketRoute) -> None:
        seq = message["seq"]
        socket.send(error(seq, "queue_full", "full", retry_after_ms=50) if seq < 4 else picture(seq, 1, "lime"))

    page = open_page(FakeServer(answer).prepare)
    note = told(page, "message")
    page.keyboard.insert_text("tree")
    shows_final(page, "tree")
    expect(page.locator("#message")).to_have_text("")
    assert page.evaluate(note) == ["Many people are drawing right now. Trying again…", ""]


def told(page: Page, name: str) -> str:
    """An expression for all that an element will have said from now on: what a screen reader reads out."""
    page.evaluate(
        """(id) => {
          const element = document.getElementById(id);
          window.told ??= {};
          told[id] = [];
          const note = () => told[id].push(element.textContent);
          new MutationObserver(note).observe(element, { childList: true, characterData: true, subtree: true });
        }""",
        name,
    )
    return f"told.{name}"


def test_whoever_looks_at_the_page_again_need_not_wait_for_the_next_try(open_page: OpenPage) -> None:
    def answer(connection: int, _: dict[str, Any], socket: WebSocketRoute) -> None:
        if connection == 1:
            socket.close(code=1012, reason='{"reconnect_in_ms": 600000}')

    page = open_page(FakeServer(answer).prepare)
    page.keyboard.insert_text("tree")
    expect(page.locator("#connection")).to_have_text("Reconnecting")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator("#connection")).to_have_text("Live")


def test_ten_thousand_characters_are_refused_in_words_and_not_cut(open_page: OpenPage) -> None:
    server = FakeServer(lambda _, message, socket: socket.send(picture(message["seq"], 1, "lime")))
    page = open_page(server.prepare)
    page.keyboard.insert_text("😀" * 10_000)
    words = "Not drawn. These are 10000 characters, and mini-lcm reads at most 500."
    expect(page.locator("#message")).to_have_text(words)
    assert server.requests == []
    assert page.evaluate("[...document.getElementById('prompt').value].length") == 10_000
    page.locator("#prompt").fill("😀" * 500)
    shows_final(page, "😀" * 500)
    expect(page.locator("#message")).to_have_text("")


def test_after_a_reconnect_previews_leave_the_picture_alone(open_page: OpenPage) -> None:
    def answer(connection: int, message: dict[str, Any], socket: WebSocketRoute) -> None:
        seq = message["seq"]
        if connection == 1:
            socket.send(picture(seq, 1, "lime"))
            socket.close(code=1012, reason="{}")
        else:
            socket.send(picture(seq, 1, "red", type="preview"))
            socket.send(picture(seq, 2, "blue", refined=True))

    page = open_page(FakeServer(answer).prepare)
    page.keyboard.insert_text("tree")
    shows_refined(page, "tree")
    shows_color(page, [0, 0, 255])
    assert page.evaluate("seen.pictures.map(([state]) => state)") == ["final"] * len(page.evaluate("seen.pictures"))


def test_while_the_network_is_behind_only_the_newest_words_go_out(open_page: OpenPage) -> None:
    sent: list[str] = []

    def prepare(page: Page) -> None:
        page.on("websocket", lambda socket: socket.on("framesent", lambda frame: sent.append(str(frame))))
        page.add_init_script(
            "window.unsent = 0; Object.defineProperty(WebSocket.prototype, 'bufferedAmount', { get: () => unsent })"
        )

    page = open_page(prepare)
    page.evaluate("window.unsent = 100_000")
    page.keyboard.type(PROMPT)
    page.wait_for_timeout(200)
    assert sent == []
    page.evaluate("window.unsent = 0")
    shows_final(page, PROMPT)
    assert [json.loads(frame)["prompt"] for frame in sent if '"generate"' in frame] == [PROMPT]


def test_a_grid_fills_as_its_pictures_come(open_page: OpenPage) -> None:
    colors = ["red", "lime", "blue", "white"]

    def answer(_: int, message: dict[str, Any], socket: WebSocketRoute) -> None:
        for index, color in enumerate(colors[: message.get("num_images", 1)]):
            socket.send(picture(message["seq"], index + 1, color, index=index))

    server = FakeServer(answer)
    page = open_page(server.prepare, state="#grid=2&refine=0")
    page.keyboard.insert_text("tree")
    shows_final(page, "4 pictures of tree")
    assert [request["num_images"] for request in server.requests] == [4]
    cells = page.evaluate(
        """() => {
          const canvas = document.getElementById("picture");
          const at = (x, y) => canvas.getContext("2d").getImageData(canvas.width * x, canvas.height * y, 1, 1).data;
          return [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]].map(([x, y]) => [...at(x, y)].slice(0, 3));
        }"""
    )
    assert cells == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    page.get_by_role("button", name="Take picture 3 of 4, seed 3").click()
    shows_final(page, "tree")
    shows_color(page, [0, 0, 255])
    expect(page.locator("#seed")).to_have_value("3")
    assert len(server.requests) == 1, "what is there isn't drawn again"


def test_a_grid_is_no_whole_while_older_pictures_stand_in_it(open_page: OpenPage) -> None:
    def answer(_: int, message: dict[str, Any], socket: WebSocketRoute) -> None:
        for index in range(4 if message["seq"] == 1 else 3):
            socket.send(picture(message["seq"], index + 1, "lime", index=index))

    page = open_page(FakeServer(answer).prepare, state="#grid=2&refine=0")
    page.keyboard.insert_text("tree")
    shows_final(page, "4 pictures of tree")
    page.keyboard.insert_text("s")
    expect(page.locator("#stage")).to_have_attribute("data-seq", "2")
    page.wait_for_timeout(200)
    expect(page.locator("#stage")).to_have_attribute("data-state", "partial")
    expect(page.locator("#picture")).to_have_attribute("aria-label", "4 pictures of tree")
    expect(page.locator("#cells")).to_be_hidden()  # a click would take a picture that isn't seen any more


def test_a_thousand_pictures_leave_nothing_behind(open_page: OpenPage) -> None:
    def answer(_: int, message: dict[str, Any], socket: WebSocketRoute) -> None:
        for frame in range(1, NUM_FRAMES):
            socket.send(picture(message["seq"], frame, "red", type="preview"))
        socket.send(picture(message["seq"], NUM_FRAMES, "lime"))

    server = FakeServer(answer)
    page = open_page(server.prepare, state="#refine=0")
    elements = page.evaluate("document.querySelectorAll('*').length")
    page.keyboard.insert_text("tree")
    shows_final(page, "tree")
    page.wait_for_function("() => seen.bitmaps === 1")  # a string to evaluate is against the page's policy
    assert page.evaluate("seen.urls") == 0
    expect(page.locator("#strip button")).to_have_count(1)
    assert page.evaluate("document.querySelectorAll('*').length") == elements + 3, "one entry of the strip"
    assert len([message for message in server.received if message["type"] == "ack"]) == NUM_FRAMES


def test_two_tabs_never_see_each_others_pictures(open_page: OpenPage) -> None:
    frames: dict[int, set[str]] = {0: set(), 1: set()}

    def listen_as(tab: int) -> Any:
        def listen(page: Page) -> None:
            page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: note(tab, frame)))

        return listen

    def note(tab: int, frame: str | bytes) -> None:
        text = frame if isinstance(frame, str) else frame[4 : 4 + int.from_bytes(frame[:4], "big")]
        frames[tab].add(json.loads(text)["request_id"] or "")

    words = [PROMPT, "a panda on a yellow background"]
    pages = [open_page(listen_as(tab), state="#seed=5") for tab in (0, 1)]
    for letters in zip(*words, strict=False):
        for page, letter in zip(pages, letters, strict=True):
            page.keyboard.type(letter)
    for page, prompt in zip(pages, words, strict=True):
        page.keyboard.type(prompt[min(map(len, words)) :])  # what is whole already would be drawn once more
        shows_refined(page, prompt)
    assert frames[0] & frames[1] == {""}
    files = [downloaded(page)[1] for page in pages]
    for file, prompt in zip(files, words, strict=True):
        alone = open_page(state="#seed=5")
        alone.keyboard.insert_text(prompt)
        shows_refined(alone, prompt)
        assert_same_picture(file, downloaded(alone)[1])
