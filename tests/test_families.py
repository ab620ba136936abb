"""Every family and variant through everything: loading, LoRA fuse, warm-up, engine, Redis and gateway, from small
folders of the same architectures. One worker keeps them all warm; each picture is diffusers' own."""

from __future__ import annotations

import asyncio
import io
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from PIL import Image

from broker.messages import SamplingParams
from models.catalog import ModelSpec
from tests.app.conftest import Api, StartApi, start_api
from tests.app.live.test_session import go_live
from tests.jobs import make_params
from tests.service import spawn
from tests.small_models import SMALL_SPECS, write_catalog
from tests.workers.engine.oracle import Oracle, largest_difference
from workers.settings import WorkerSettings
from workers.worker import Worker

__all__ = ["start_api"]  # a fixture
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("families")]

NAMES = {title: title.lower().replace(" ", "-") for title in SMALL_SPECS}


@dataclass(frozen=True)
class Families:
    api: Api
    specs: dict[str, ModelSpec]
    catalog: Path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def families(
    start_api: StartApi, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Families]:
    root: Path = tmp_path_factory.mktemp("families")
    few: dict[str, Any] = {"max_batch_size": 2, "max_num_images": 1}  # which keeps the warm-up short
    specs = {title: make(root).model_copy(update={"name": NAMES[title], **few}) for title, make in SMALL_SPECS.items()}
    catalog, prefix = write_catalog(root / "catalog.toml", list(specs.values())), f"test-{uuid.uuid4().hex}"
    names = ",".join(NAMES.values())
    shared: dict[str, Any] = {"catalog": catalog}
    worker = Worker(
        WorkerSettings(redis_url=redis_url, redis_prefix=prefix, models=names, dtype="float32", device="cpu", **shared)
    )
    async with (
        asyncio.timeout(150),
        asyncio.TaskGroup() as tasks,
        start_api(has_worker=False, prefix=prefix, default_model=NAMES["consistency"], **shared) as api,
    ):
        tasks.create_task(worker.serve())
        while not all(card["ready"] for card in (await api.http.get("/v1/models")).json()["data"]):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        yield Families(api, specs, catalog)
        worker.request_stop()


def wish(spec: ModelSpec) -> dict[str, Any]:
    """What a request says of a picture, all else being the entry's defaults."""
    return {"prompt": "goldfish" if spec.classes else "a red apple", "seed": 11, "model": spec.name}


def as_drawn(spec: ModelSpec) -> SamplingParams:
    """The parameters that the gateway makes of it."""
    return make_params(
        prompt=wish(spec)["prompt"],
        seed=11,
        num_inference_steps=spec.num_inference_steps.default,
        guidance_scale=spec.guidance_scale.default,
        scheduler=spec.default_scheduler,
    )


@pytest.mark.parametrize("title", SMALL_SPECS)
async def test_a_picture_through_the_whole_service_is_diffusers_own(families: Families, title: str) -> None:
    spec = families.specs[title]
    answer = await families.api.http.post("/v1/generations", json=wish(spec), headers={"Accept": "image/png"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-fewstep-model"] == spec.name
    pixels = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert largest_difference(pixels[None], Oracle(spec).draw(as_drawn(spec))) <= 1


async def test_all_families_at_once(families: Families) -> None:
    """Each model's own requests share batches with each other, and no model another's."""

    async def draw(spec: ModelSpec, seed: int) -> bytes:
        body = wish(spec) | {"seed": seed}
        answer = await families.api.http.post("/v1/generations", json=body, headers={"Accept": "image/png"})
        assert answer.status_code == 200, answer.text
        return answer.content

    wishes = [(spec, seed) for seed in (1, 2) for spec in families.specs.values()]
    pictures = await asyncio.gather(*(draw(*wish) for wish in wishes))
    assert len(set(pictures)) == len(wishes)


async def test_what_is_told_of_a_class_conditional_model(families: Families) -> None:
    cards = {card["id"]: card for card in (await families.api.http.get("/v1/models")).json()["data"]}
    card = cards[NAMES["consistency"]]
    assert card["num_classes"] == 1000
    assert card["example_prompts"][0] == "tench"
    assert len(card["example_prompts"]) == 10
    assert not card["has_tiny_decoder"]
    assert cards[NAMES["sdxl"]]["num_classes"] is None


async def test_an_unknown_class_is_refused_the_same_way_everywhere(families: Families) -> None:
    model = NAMES["consistency"]
    near = "near names: goldfish, goldfinch"
    answer = await families.api.http.post("/v1/generations", json={"prompt": "goldfsh", "model": model})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "unknown_class", "prompt")
    assert near in error["message"]
    async with AsyncOpenAI(api_key="unused", base_url=f"{families.api.url}/v1", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match=near) as caught:
            await client.images.generate(prompt="goldfsh", model=model)
    assert caught.value.code == "unknown_class"


async def test_someone_who_types_a_class_letter_by_letter(families: Families) -> None:
    """What is no class yet is an error of its frame; the session goes on to the class."""
    typed = ["g", "go", "goldf", "goldfish"]
    async with go_live(families.api) as live:
        for seq, prompt in enumerate(typed, start=1):
            await live.generate(seq, prompt)
        final = await live.until_final(len(typed))
    errors = [message for message in live.messages if message["type"] == "error"]
    assert [error["seq"] for error in errors] == [1, 2, 3]
    assert {error["error"]["code"] for error in errors} == {"unknown_class"}
    assert "goldfish, goldfinch" in errors[-1]["error"]["message"]
    assert final.header["seq"] == 4


async def test_the_command_refuses_an_unknown_class_before_it_loads(families: Families, tmp_path: Path) -> None:
    log = tmp_path / "generate.log"
    arguments = ("generate", "goldfsh", "--model", NAMES["consistency"], "-o", str(tmp_path / "out.png"))
    process = spawn(*arguments, log=log, FEWSTEP_CATALOG=str(families.catalog))
    assert await asyncio.to_thread(process.wait, 60) == 78
    assert "near names: goldfish, goldfinch" in " ".join(log.read_text().split())
