"""The clients without asyncio, against a real service."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator

import pytest
from PIL import Image

from fewstep_client import (
    BadRequest,
    Client,
    Closed,
    FinalFrame,
    Live,
    LiveClosed,
    LiveEvent,
    Picture,
    Preview,
    PreviewFrame,
    Ready,
    Refine,
    Superseded,
)

PROMPT = "a red apple on a blue background"
pytestmark = pytest.mark.xdist_group("service")


@pytest.fixture
def client(service_url: str) -> Iterator[Client]:
    with Client(service_url) as client:
        yield client


def size_of(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image.size


def test_a_picture(client: Client) -> None:
    one, two = (client.generate(PROMPT, seed=7, cache=False) for _ in range(2))
    assert size_of(one.data) == (64, 64)
    assert one.data == two.data
    with pytest.raises(BadRequest, match="width"):
        client.generate(PROMPT, width=63)


def test_a_stream(client: Client) -> None:
    items = list(client.stream(PROMPT, num_inference_steps=8))
    assert {size_of(item.data) for item in items} == {(64, 64)}
    assert isinstance(items[0], Preview)
    assert [type(item) for item in items].count(Picture) == 1
    assert next(client.stream(PROMPT))


def test_submit_wait_and_cancel(client: Client) -> None:
    generation_id = client.submit(PROMPT, num_images=2)
    assert [size_of(picture.data) for picture in client.wait(generation_id)] == [(64, 64)] * 2
    assert client.cancel(generation_id) == "completed"


def test_typing_gives_previews_and_the_newest_final(service_url: str) -> None:
    with Live(service_url) as live:
        events = iter(live)
        assert isinstance(next(events), Ready)
        for length in range(1, len(PROMPT) + 1):
            live.generate(PROMPT[:length], num_inference_steps=8)
        seen = []
        for event in events:
            seen.append(event)
            if isinstance(event, FinalFrame) and event.seq == len(PROMPT):
                break
        live.cancel()
    finals = [event.seq for event in seen if isinstance(event, FinalFrame)]
    superseded = {event.seq for event in seen if isinstance(event, Superseded)}
    assert finals == sorted(finals)
    assert superseded
    assert superseded.isdisjoint(finals)
    assert any(isinstance(event, PreviewFrame) for event in seen)
    assert isinstance(event, FinalFrame)
    assert size_of(event.data) == (64, 64)


def test_a_pause_gives_the_better_picture_of_the_same_seed(service_url: str) -> None:
    with Live(service_url) as live:
        live.generate(PROMPT, num_inference_steps=1, refine=Refine(after_ms=50, num_inference_steps=8))
        quick, better = (next(event for event in live if isinstance(event, FinalFrame)) for _ in range(2))
    assert (quick.refined, better.refined) == (False, True)
    assert (quick.num_inference_steps, better.num_inference_steps) == (1, 8)
    assert quick.seed == better.seed
    assert quick.data != better.data


def test_nothing_is_left_of_a_closed_client(service_url: str) -> None:
    with Live(service_url) as live:
        assert isinstance(next(iter(live)), Ready)
    assert "fewstep-client" not in [thread.name for thread in threading.enumerate()]
    live.close()


def test_a_token_source_may_block(service_url: str) -> None:
    asked: list[str] = []

    def token() -> str:
        asked.append(threading.current_thread().name)
        return "whatever"

    with Live(service_url, token=token) as live:
        assert isinstance(next(iter(live)), Ready)
    assert len(asked) == 1
    assert asked[0] != "fewstep-client"


def test_a_refusal_is_the_last_event(service_url: str) -> None:
    with Live(service_url, origin="https://elsewhere.example") as live:
        assert [type(event) for event in live] == [Closed]
        with pytest.raises(LiveClosed):
            live.generate(PROMPT)


def test_a_closed_client_says_so_as_the_one_with_asyncio_does(service_url: str) -> None:
    with Live(service_url) as live:
        assert isinstance(next(iter(live)), Ready)
    for call in (live.cancel, lambda: live.generate(PROMPT)):
        with pytest.raises(LiveClosed, match="the connection is closed: closed by this client"):
            call()
    assert list(live) == [Closed(1000, "closed by this client")]


def test_closing_in_one_thread_ends_the_iteration_in_another() -> None:
    for _ in range(40):
        live = Live("http://127.0.0.1:1")  # where nobody listens
        last: list[LiveEvent] = []
        reader = threading.Thread(target=lambda live, last: last.extend(live), args=(live, last), daemon=True)
        reader.start()
        live.close()
        reader.join(5)
        assert not reader.is_alive()
        assert isinstance(last[-1], Closed)
