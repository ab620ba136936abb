"""What a person sees and does on the live page, and a socket that misbehaves on purpose."""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from playwright.sync_api import Page, WebSocketRoute, expect

PROMPT = "a red apple on a blue background"
LIVE_URL = re.compile(r"/v1/live$")
# Of two drawings of one request in half precision, see docs/performance.md.
MAX_DIFFERENCE, MAX_MEAN_DIFFERENCE = 16, 1.0


def shows_final(page: Page, prompt: str) -> None:
    expect(page.locator("#picture")).to_have_attribute("aria-label", prompt)
    expect(page.locator("#stage")).to_have_attribute("data-state", "final")


def shows_refined(page: Page, prompt: str) -> None:
    """All at once: a pause while typing refines the words before, and then the quick picture of the last ones comes."""
    picture = page.locator(f"#picture[aria-label={json.dumps(prompt)}]")
    expect(page.locator("#stage[data-state=final][data-refined=true]", has=picture)).to_be_attached()


def shows_color(page: Page, color: list[int]) -> None:
    """In the middle of the picture as it is on the page; a blend may still be under way."""
    page.wait_for_function(
        """(color) => {
          const canvas = document.getElementById("picture");
          const { width, height } = canvas;
          const { data } = canvas.getContext("2d").getImageData(width / 2, height / 2, 1, 1);
          return color.every((value, index) => data[index] === value);
        }""",
        arg=color,
    )


def draw_again(page: Page, act: Callable[[], Any]) -> None:
    """Does something that asks for exactly one picture, and waits for its better one."""
    seq = int(page.locator("#stage").get_attribute("data-seq") or 0)
    act()
    expect(page.locator("#stage")).to_have_attribute("data-seq", str(seq + 1))
    expect(page.locator("#stage")).to_have_attribute("data-refined", "true")
    expect(page.locator("#stage")).to_have_attribute("data-state", "final")


def is_kept(page: Page, count: int) -> None:
    expect(page.locator("#strip button")).to_have_count(count)


def downloaded(page: Page) -> tuple[str, bytes]:
    with page.expect_download() as waiting:
        page.locator("#download").click()
    return waiting.value.suggested_filename, waiting.value.path().read_bytes()


def copied(page: Page, kind: str) -> str:
    """What a button puts into the clipboard."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(f"#{kind}").click()
    expect(page.locator("#message")).to_contain_text("is in the clipboard")
    text: str = page.evaluate("navigator.clipboard.readText()")
    return text


def pixels(data: bytes) -> npt.NDArray[np.int16]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.int16)


def assert_same_picture(one: bytes, other: bytes) -> None:
    difference = np.abs(pixels(one) - pixels(other))
    assert difference.max() <= MAX_DIFFERENCE
    assert difference.mean() <= MAX_MEAN_DIFFERENCE


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

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [message for message in self.received if message["type"] == "generate"]


def picture(seq: int, frame: int, color: str, type: str = "final", index: int = 0, *, refined: bool = False) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    header = {"type": type, "frame": frame, "seq": seq, "step": 4, "num_inference_steps": 4, "seed": 1 + index}
    header |= {"index": index, "format": "png", "refined": refined, "timings": None}
    encoded = json.dumps(header).encode()
    return struct.pack(">I", len(encoded)) + encoded + buffer.getvalue()


def error(seq: int, code: str, message: str, **more: object) -> str:
    body = {"message": message, "type": "x", "param": None, "code": code}
    return json.dumps({"type": "error", "seq": seq, "request_id": None, "error": body, **more})
