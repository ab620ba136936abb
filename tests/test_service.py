"""End to end, through a real `fewstep serve` process with the bundled model."""

from __future__ import annotations

import base64
import io
import json
import signal
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from PIL import Image
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from models.catalog import StepRange, load_catalog
from tests.service import Service, start_service
from tests.small_models import write_catalog

PROMPT = "a red apple on a blue background"
pytestmark = pytest.mark.xdist_group("service")


@pytest.fixture(scope="module")
def http(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=60) as client:
        yield client


def read_image(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def corner(image: Image.Image) -> tuple[int, ...]:
    return tuple(np.asarray(image.convert("RGB"))[:6, :6].reshape(-1, 3).mean(axis=0).astype(int))


def test_bytes(http: httpx.Client) -> None:
    answer = http.post("/v1/generations", json={"prompt": PROMPT, "seed": 1}, headers={"Accept": "image/png"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    image = read_image(answer.content)
    assert image.size == (64, 64)
    red, green, blue = corner(image)
    assert blue > red + 40, f"a blue corner was asked for, it is {red, green, blue}"
    stages = dict(part.strip().split(";dur=") for part in answer.headers["server-timing"].split(","))
    assert {"queue", "text", "denoise", "decode", "encode", "total"} <= set(stages)
    assert answer.headers["x-request-id"]


def test_json_and_the_same_seed_gives_the_same_picture(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "seed": 5, "num_images": 2}
    one, two = (http.post("/v1/generations", json=body).json() for _ in range(2))
    assert one["state"] == "completed"
    assert one["parameters"]["seed"] == 5
    assert [image["seed"] for image in one["images"]] == [5, 6]
    assert [image["b64_json"] for image in one["images"]] == [image["b64_json"] for image in two["images"]]
    assert one["images"][0]["b64_json"] != one["images"][1]["b64_json"]
    assert len(one["timings"]["steps_ms"]) == 4


def test_async_then_poll_then_image(http: httpx.Client) -> None:
    answer = http.post("/v1/generations", json={"prompt": PROMPT}, headers={"Prefer": "respond-async"})
    assert answer.status_code == 202
    location = answer.headers["location"]
    generation = wait_for_end(http, location)
    assert generation["state"] == "completed"
    image = http.get(f"{location}/image")
    assert read_image(image.content).size == (64, 64)


def wait_for_end(http: httpx.Client, location: str, timeout_s: float = 60) -> dict[str, Any]:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            generation: dict[str, Any] = http.get(location).raise_for_status().json()
            if generation["state"] not in ("queued", "running"):
                return generation
        except (httpx.TransportError, httpx.HTTPStatusError):
            pass  # the gateway may be on its way back
        time.sleep(0.1)
    raise AssertionError(f"{location} didn't end within {timeout_s} s")


def test_sse_gives_every_event_in_order(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "previews": True, "num_inference_steps": 8}
    answer = http.post("/v1/generations", json=body, headers={"Prefer": "respond-async"})
    events: list[tuple[int, str]] = []
    with http.stream("GET", f"{answer.headers['location']}/events") as stream:
        number = 0
        for line in stream.iter_lines():
            if line.startswith("id:"):
                number = int(line.removeprefix("id:"))
            elif line.startswith("event:"):
                name = line.removeprefix("event:").strip()
            elif line.startswith("data:"):
                events.append((number, name))
                data = json.loads(line.removeprefix("data:"))
    names = [name for _, name in events]
    assert (names[0], names[-1]) == ("queued", "completed")
    assert names.index("started") == 1
    assert [number for number, _ in events] == sorted({number for number, _ in events})
    assert data["state"] == "completed"


def test_the_openai_client(service: Service) -> None:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
        result = client.images.generate(model="mini-lcm", prompt=PROMPT, size="auto", n=2, extra_body={"seed": 9})
        assert result.data is not None
        images = [read_image(base64.b64decode(item.b64_json or "")) for item in result.data]
        assert [image.size for image in images] == [(64, 64)] * 2
        with pytest.raises(openai.NotFoundError, match="mini-lcm"):
            client.images.generate(model="gpt-image-9", prompt=PROMPT)


def open_live(service: Service) -> ClientConnection:
    url = service.url.replace("http", "ws") + "/v1/live"
    return connect(url, subprotocols=[Subprotocol("fewstep.live.v1")])


def next_frame(socket: ClientConnection) -> tuple[dict[str, Any], bytes]:
    """The next message: JSON and, for a picture, its bytes."""
    message = socket.recv(timeout=30)
    if isinstance(message, str):
        return json.loads(message), b""
    (length,) = struct.unpack(">I", message[:4])
    return json.loads(message[4 : 4 + length]), message[4 + length :]


def test_live_previews_then_final(service: Service) -> None:
    with open_live(service) as socket:
        ready, _ = next_frame(socket)
        assert ready["type"] == "ready"
        generate = {"type": "generate", "seq": 1, "prompt": PROMPT, "previews": True, "num_inference_steps": 8}
        socket.send(json.dumps(generate))
        kinds: list[str] = []
        while "final" not in kinds:
            header, data = next_frame(socket)
            kinds.append(header["type"])
            if data:
                assert read_image(data).size == (64, 64)
                socket.send(json.dumps({"type": "ack", "frame": header["frame"]}))
    assert "preview" in kinds
    assert header["seed"] == ready["seed"]


def test_live_typing_supersedes(service: Service) -> None:
    text = "a red apple on a blue background"
    with open_live(service) as socket:
        next_frame(socket)
        for seq in range(1, len(text) + 1):
            socket.send(json.dumps({"type": "generate", "seq": seq, "prompt": text[:seq], "previews": False}))
        finals: list[int] = []
        superseded: set[int] = set()
        while not finals or finals[-1] != len(text):
            header, data = next_frame(socket)
            if data:
                finals.append(header["seq"])
                socket.send(json.dumps({"type": "ack", "frame": header["frame"]}))
            elif header["type"] == "superseded":
                superseded.add(header["seq"])
    assert finals == sorted(finals)
    assert superseded
    assert superseded.isdisjoint(finals)


def test_models_health_metrics_page(http: httpx.Client) -> None:
    http.post("/v1/generations", json={"prompt": PROMPT})
    models = {model["id"]: model for model in http.get("/v1/models").json()["data"]}
    assert models["mini-lcm"]["ready"]
    assert not models["sd15-lcm"]["ready"]
    assert http.get("/livez").status_code == 200
    assert http.get("/readyz").status_code == 200
    metrics = http.get("/metrics").text
    for name in (
        "fewstep_request_duration_seconds",
        "fewstep_queue_wait_seconds",
        "fewstep_stage_seconds",
        "fewstep_queue_depth",
    ):
        assert name in metrics
    page = http.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        (b'{"prompt": 3}', 400, "prompt"),
        (b"{}", 400, "prompt"),
        (b'{"prompt": "a", "width": 63}', 400, "width"),
        (b'{"prompt": "a", "seed": NaN}', 400, "seed"),
        (b'{"prompt": "a", "steps": 4}', 400, "steps"),
        (b'{"prompt": "a", "model": "nothing"}', 404, "model"),
        (b'{"prompt": "' + b"a" * 70_000 + b'"}', 413, None),
    ],
)
def test_bad_input(http: httpx.Client, body: bytes, status: int, param: str | None) -> None:
    answer = http.post("/v1/generations", content=body, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"}
    assert len(answer.content) < 2000


def test_many_clients_at_once(http: httpx.Client) -> None:
    def draw(seed: int) -> str:
        body = {"prompt": PROMPT, "seed": seed, "num_inference_steps": 1 + seed % 4, "metadata": False}
        answer = http.post("/v1/generations", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["state"])

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(draw, range(64))) == ["completed"] * 64


def wait_for_log(service: Service, words: str, times: int) -> None:
    deadline_s = time.monotonic() + 30
    while service.log.read_text().count(words) < times:
        assert time.monotonic() < deadline_s, service.log.read_text()
        time.sleep(0.05)


class TestFaults:
    """Each with a service of its own."""

    @pytest.fixture
    def own(self, tmp_path: Path) -> Any:
        service = start_service(tmp_path / "serve.log", FEWSTEP_LEASE_S="2")
        yield service
        if service.process.poll() is None:
            service.stop()

    @staticmethod
    def submit(service: Service, num_requests: int) -> list[str]:
        with httpx.Client(base_url=service.url, timeout=30) as http:
            headers = {"Prefer": "respond-async"}
            body = {"prompt": PROMPT, "num_inference_steps": 20}
            return [
                http.post("/v1/generations", json=body, headers=headers).raise_for_status().headers["location"]
                for _ in range(num_requests)
            ]

    def test_the_worker_is_killed_under_load(self, own: Service) -> None:
        locations = self.submit(own, 40)
        own.child("worker").kill()
        with httpx.Client(base_url=own.url, timeout=30) as http:
            assert {wait_for_end(http, location, 120)["state"] for location in locations} == {"completed"}
        assert "worker ended (killed by SIGKILL)" in own.log.read_text()

    def test_the_gateway_is_killed_under_load(self, own: Service) -> None:
        locations = self.submit(own, 40)
        own.child("gateway").kill()
        with httpx.Client(base_url=own.url, timeout=30) as http:
            assert {wait_for_end(http, location, 120)["state"] for location in locations} == {"completed"}

    def test_a_hangup_reads_the_catalog_again_everywhere(self, tmp_path: Path) -> None:
        """A broken file first, which changes nothing; then one with another limit."""
        few: dict[str, Any] = {"max_batch_size": 2, "max_num_images": 1, "loras": {}}  # so that it is warm soon
        few["num_inference_steps"] = StepRange(default=4, min=1, max=8)
        shipped = load_catalog()["mini-lcm"].model_copy(update=few)
        extra = write_catalog(tmp_path / "extra.toml", [shipped])
        own = start_service(tmp_path / "serve.log", FEWSTEP_EXTRA_CATALOG=str(extra))
        many = {"prompt": PROMPT, "num_inference_steps": 9}
        try:
            with httpx.Client(base_url=own.url, timeout=30) as http:
                pids = {name: own.child(name).pid for name in ("gateway", "worker")}
                extra.write_text("[mini-lcm", encoding="utf-8")
                own.process.send_signal(signal.SIGHUP)
                wait_for_log(own, f"the catalog stays as it was: {extra}", 2)
                assert http.post("/v1/generations", json=many).status_code == 400
                steps = StepRange(default=4, min=1, max=9)
                write_catalog(extra, [shipped.model_copy(update={"num_inference_steps": steps})])
                own.process.send_signal(signal.SIGHUP)
                wait_for_log(own, "the catalog was read again, changed: ", 2)
                assert len(http.post("/v1/generations", json=many).json()["timings"]["steps_ms"]) == 9
                assert {name: own.child(name).pid for name in pids} == pids
        finally:
            assert own.stop() == 0

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
    def test_nothing_stays_behind(self, own: Service, number: int) -> None:
        children = psutil.Process(own.process.pid).children(recursive=True)
        assert len(children) == 3, "gateway, worker, Redis"
        status = own.stop(number)
        assert status == (0 if number == signal.SIGINT else -number)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert alive == []
        assert "Traceback" not in own.log.read_text()

    def test_a_client_that_goes_away_cancels_its_request(self, own: Service) -> None:
        body = {"prompt": PROMPT, "num_inference_steps": 20, "num_images": 9}
        with httpx.Client(base_url=own.url, timeout=0.3) as http, pytest.raises(httpx.ReadTimeout):
            http.post("/v1/generations", json=body)
        deadline_s = time.monotonic() + 10
        with httpx.Client(base_url=own.url, timeout=30) as http:
            while 'outcome="cancelled"' not in http.get("/metrics").text:
                assert time.monotonic() < deadline_s
                time.sleep(0.1)
