"""Two callers of the real service: whoever comes with a few requests doesn't wait for who came with hundreds."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from app.access.key_file import format_entry, make_key, new_record
from tests.service import Service, start_service

NUM_QUEUED = 400


@pytest.fixture(scope="module")
def keys() -> dict[str, str]:
    return {"flood": make_key()[1], "single": make_key()[1]}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, keys: dict[str, str]) -> Iterator[Service]:
    entries = [format_entry(key.split("_")[1], new_record(key, name=name)) for name, key in keys.items()]
    log = tmp_path_factory.mktemp("service") / "serve.log"
    service = start_service(log, FEWSTEP_API_KEYS=" ".join(entries))
    yield service
    service.stop()


def caller(service: Service, key: str) -> httpx.Client:
    return httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {key}"}, timeout=120)


def state_of(client: httpx.Client, location: str) -> str:
    return str(client.get(location).json()["state"])


def test_one_callers_flood_does_not_hold_up_anothers_first(service: Service, keys: dict[str, str]) -> None:
    with caller(service, keys["flood"]) as flood, caller(service, keys["single"]) as single:

        def queue(i: int) -> str:
            body = {"prompt": f"a red apple, no. {i}", "num_inference_steps": 8}
            return flood.post("/v1/generations", json=body, headers={"Prefer": "respond-async"}).headers["Location"]

        with ThreadPoolExecutor(8) as pool:
            locations = list(pool.map(queue, range(NUM_QUEUED)))
        answer = single.post("/v1/generations", json={"prompt": "a panda"})
        assert answer.status_code == 200
        num_left = sum(state_of(flood, location) == "queued" for location in locations[::10]) * 10
        assert num_left > NUM_QUEUED / 4, "the single request came before the better part of the flood"
        for location in locations:
            flood.delete(location)


def test_nobody_comes_in_without_a_key(service: Service) -> None:
    with httpx.Client(base_url=service.url) as stranger:
        assert stranger.post("/v1/generations", json={"prompt": "a panda"}).status_code == 401
        assert stranger.get("/readyz").status_code == 200
