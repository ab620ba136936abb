"""Style LoRAs through a real `fewstep serve`: gateway, Redis, worker."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.catalog import BUNDLED_PATH
from tests.service import Service, free_port, start_service
from tests.style_loras import ATTENTION, TEXT, write_lora

CATALOG = """
[loras.{name}]
description = "random weights"
source = "{source}"
weight_name = "{name}.safetensors"
models = ["mini-lcm"]
weight = {{ default = 1.0, min = -2.0, max = 2.0 }}
license = "Apache-2.0"
"""
WISHES: list[list[dict[str, Any]]] = [
    [],
    [{"name": "ink"}],
    [{"name": "ink", "weight": 0.4}],
    [{"name": "mood"}],
    [{"name": "ink", "weight": 0.5}, {"name": "mood", "weight": -0.5}],
    [],
    [{"name": "mood", "weight": 0.5}, {"name": "ink"}],
    [{"name": "ink"}],
]


@pytest.fixture(scope="module")
def metrics_url() -> str:
    return f"http://127.0.0.1:{free_port()}/metrics"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, metrics_url: str) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("loras")
    base = BUNDLED_PATH / "mini-sd"
    write_lora(folder / "ink.safetensors", base, {"unet": ATTENTION}, "kohya", alpha=1.0)
    write_lora(folder / "mood.safetensors", base, {"unet": ATTENTION, "text_encoder": TEXT}, seed=1)
    (folder / "broken.safetensors").write_bytes(b"nothing")
    catalog = folder / "catalog.toml"
    catalog.write_text("".join(CATALOG.format(name=name, source=folder) for name in ("ink", "mood", "broken")))
    settings = {
        "FEWSTEP_EXTRA_CATALOG": str(catalog),
        "FEWSTEP_DTYPE": "float32",
        "FEWSTEP_CACHE_S": "0",
        "FEWSTEP_WORKER_METRICS_PORT": metrics_url.partition("/metrics")[0].rpartition(":")[2],
    }
    service = start_service(folder / "serve.log", **settings)
    yield service
    service.stop()


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=60) as http:
        yield http


def draw(http: httpx.Client, number: int) -> NDArray[np.int_]:
    body = {"prompt": "a red apple on a blue background", "seed": number, "loras": WISHES[number]}
    answer = http.post("/v1/generations", json=body, headers={"Accept": "image/png"})
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(answer.content))).astype(int)


def test_eight_wishes_at_once_are_drawn_as_each_alone(http: httpx.Client, metrics_url: str) -> None:
    alone = [draw(http, number) for number in range(len(WISHES))]
    with ThreadPoolExecutor(len(WISHES)) as pool:
        together = list(pool.map(lambda number: draw(http, number), range(len(WISHES))))
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one - other).max() <= 2
    metrics = httpx.get(metrics_url).text
    resident = re.search(r'fewstep_resident_loras{model="mini-lcm"} (\d+)', metrics)
    assert resident is not None
    assert int(resident[1]) >= 2
    assert 'fewstep_lora_switch_seconds_count{model="mini-lcm"}' in metrics


def test_each_wish_is_another_picture(http: httpx.Client) -> None:
    body = {"prompt": "a red apple on a blue background", "seed": 0}
    pictures = []
    for wish in WISHES[:5]:
        answer = http.post("/v1/generations", json=body | {"loras": wish}, headers={"Accept": "image/png"})
        pictures.append(np.asarray(Image.open(io.BytesIO(answer.content))).astype(int))
    for number, one in enumerate(pictures):
        for other in pictures[:number]:
            assert np.abs(one - other).max() > 20


def test_a_lora_that_cant_be_read_fails_alone_and_in_plain_words(service: Service, http: httpx.Client) -> None:
    body = {"prompt": "a red apple", "loras": [{"name": "broken"}, {"name": "ink"}]}
    answer = http.post("/v1/generations", json=body)
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert (error["code"], "a LoRA of this request can't be loaded" in error["message"]) == ("internal_error", True)
    assert "broken.safetensors" not in answer.text, "files are the operator's business"
    assert "is not a sound safetensors file" in service.log.read_text()
    draw(http, 1)
