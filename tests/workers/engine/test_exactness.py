"""The engine's pictures are those of diffusers' own pipeline, for every family, alone and in company.

`make_params` gives guidance 0 and four LCM steps where a mix doesn't say else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from models.catalog import ModelSpec, get_spec, load_catalog
from models.loading import load_diffusers, load_pipeline
from models.pipeline import FewStepPipeline
from tests.jobs import make_delivery, make_params
from tests.small_models import SMALL_SPECS
from tests.workers.engine.oracle import Oracle, draw, largest_difference
from workers.engine import Engine, Finished, GenerationFailed, PreviewReady
from workers.engine.engine import run_until_done
from workers.engine.runner import ModelRunner

Mix = list[dict[str, Any]]

PLAIN: Mix = [
    {"prompt": "a red apple", "num_inference_steps": 4},
    {"prompt": "a blue cat", "num_inference_steps": 1, "seed": 2},
    {"prompt": "two dogs", "num_inference_steps": 8, "scheduler": "ddim", "seed": 3},
    {"prompt": "a tree", "num_inference_steps": 3, "scheduler": "euler-ancestral", "seed": 4},
    {"prompt": "a car", "num_inference_steps": 6, "scheduler": "dpm-solver", "seed": 5},
    {"prompt": "a house", "guidance_scale": 1.5, "negative_prompt": "red", "seed": 6},
    {"prompt": "a bird", "guidance_scale": 2.0, "scheduler": "euler", "num_inference_steps": 5, "seed": 8},
    {"prompt": "a fish", "num_images": 3, "scheduler": "tcd", "seed": 9},
]
TURBO: Mix = [
    {"prompt": "a red apple", "scheduler": "euler-ancestral", "num_inference_steps": 1},
    {"prompt": "a blue cat", "scheduler": "euler", "num_inference_steps": 4, "seed": 2},
    {"prompt": "two dogs", "scheduler": "euler-ancestral", "num_inference_steps": 2, "num_images": 2, "seed": 3},
    {"prompt": "a tree", "num_inference_steps": 3, "width": 48, "seed": 4},
    {"prompt": "a car", "scheduler": "dpm-solver", "num_inference_steps": 6, "seed": 5},
    {"prompt": "a house", "guidance_scale": 1.5, "seed": 6},
    {"prompt": "a bird", "guidance_scale": 1.5, "negative_prompt": "", "seed": 6},
    {"prompt": "a fish", "guidance_scale": 2.0, "negative_prompt": "blue", "scheduler": "ddim", "seed": 9},
]
UNGUIDED: Mix = [*TURBO[:5], *({**wish, "guidance_scale": 0.0} for wish in TURBO[5:])]
EMBEDDED: Mix = [
    {"prompt": "a red apple", "guidance_scale": 8.5},
    {"prompt": "a red apple", "guidance_scale": 3.0},
    {"prompt": "a blue cat", "guidance_scale": 13.0, "num_inference_steps": 1, "seed": 2},
    {"prompt": "two dogs", "guidance_scale": 8.0, "num_inference_steps": 8, "seed": 3},
    {"prompt": "a tree", "guidance_scale": 1.0, "num_inference_steps": 2, "seed": 4},
    {"prompt": "a car", "guidance_scale": 0.0, "num_inference_steps": 2, "seed": 4},
    {"prompt": "a house", "guidance_scale": 4.0, "num_images": 2, "seed": 6},
    {"prompt": "a bird", "guidance_scale": 5.0, "num_inference_steps": 3, "seed": 8},
]
CLASSES: Mix = [
    {"prompt": "goldfish", "scheduler": "multistep", "num_inference_steps": 1},
    {"prompt": "Golden Retriever", "scheduler": "multistep", "num_inference_steps": 2, "seed": 2},
    {"prompt": "golden retriever", "scheduler": "even", "num_inference_steps": 2, "seed": 2},
    {"prompt": "class 340", "scheduler": "multistep", "num_inference_steps": 4, "seed": 3},
    {"prompt": "daisy", "scheduler": "multistep", "num_inference_steps": 3, "seed": 4},
    {"prompt": "pizza", "scheduler": "even", "num_inference_steps": 1, "seed": 5},
    {"prompt": "pizza pie", "scheduler": "multistep", "num_inference_steps": 2, "num_images": 3, "seed": 6},
    {"prompt": "toilet tissue", "scheduler": "even", "num_inference_steps": 3, "num_images": 2, "seed": 8},
]
MIXES: dict[str, Mix] = {
    "sd with an LCM-LoRA": PLAIN,
    "full LCM of sd": EMBEDDED,
    "sd turbo": UNGUIDED,
    "sdxl": TURBO,
    "sdxl with an LCM-LoRA": PLAIN,
    "full LCM of sdxl": EMBEDDED,
    "sdxl turbo": UNGUIDED,
    "sdxl with a Turbo LoRA": UNGUIDED,
    "ssd-1b with an LCM-LoRA": PLAIN,
    "consistency": CLASSES,
}


class Subject:
    """A small model of one family: the oracle and the engine."""

    def __init__(self, spec: ModelSpec) -> None:
        self.oracle = Oracle(spec)
        self.engine = Engine({"small": ModelRunner(load_pipeline(spec, torch.device("cpu"), torch.float32))})


Subjects = Callable[[str], Subject]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    """By the names of `SMALL_SPECS`, each made when a test first asks for it."""
    root = tmp_path_factory.mktemp("families")
    return cache(lambda name: Subject(SMALL_SPECS[name](root)))


@pytest.fixture(scope="module")
def oracle(spec: ModelSpec) -> Oracle:
    """Of the model that `engine` and `pipeline` hold."""
    return Oracle(spec)


@pytest.mark.parametrize("name", SMALL_SPECS)
def test_alone_and_in_a_mixed_batch_of_eight(subjects: Subjects, name: str) -> None:
    subject = subjects(name)
    all_params = [make_params(**changes) for changes in MIXES[name]]
    for params, together in zip(all_params, draw(subject.engine, *all_params), strict=True):
        (alone,) = draw(subject.engine, params)
        wanted = subject.oracle.draw(params)
        assert largest_difference(alone, wanted) <= 1, f"{params.prompt} alone"
        assert largest_difference(together, wanted) <= 1, f"{params.prompt} in company"


def test_a_class_changes_the_picture_and_so_do_the_papers_timesteps(subjects: Subjects) -> None:
    wishes = [
        make_params(prompt=prompt, scheduler=scheduler, num_inference_steps=2)
        for prompt, scheduler in (("goldfish", "multistep"), ("zebra", "multistep"), ("goldfish", "even"))
    ]
    fish, zebra, even = draw(subjects("consistency").engine, *wishes)
    assert largest_difference(fish, zebra) > 5
    assert largest_difference(fish, even) > 5


def test_the_first_preview_of_a_consistency_model_is_its_picture_of_one_step(subjects: Subjects) -> None:
    engine = subjects("consistency").engine
    (picture,) = draw(engine, make_params(prompt="zebra", scheduler="multistep", num_inference_steps=1))
    params = make_params(prompt="zebra", scheduler="multistep", num_inference_steps=3, previews=True)
    delivery = make_delivery("previews")
    engine.add(replace(delivery, job=replace(delivery.job, params=params)))
    previews = [output.pixels for output in run_until_done(engine) if isinstance(output, PreviewReady)]
    assert len(previews) == 2
    assert largest_difference(previews[0], picture) <= 1
    assert largest_difference(previews[1], picture) > 5


def test_a_prompt_that_names_no_class_fails_alone(subjects: Subjects) -> None:
    """A gateway refuses it; whoever brings it here anyway spoils nobody else's picture."""
    subject = subjects("consistency")
    for number, prompt in enumerate(("goldfish", "a red apple")):
        params = make_params(prompt=prompt, scheduler="even", num_inference_steps=1)
        delivery = make_delivery(str(number))
        subject.engine.add(replace(delivery, job=replace(delivery.job, params=params)))
    outputs = {output.request.request_id: output for output in run_until_done(subject.engine)}
    assert isinstance(outputs["0"], Finished)
    assert isinstance(outputs["1"], GenerationFailed)


def test_guidance_that_is_embedded_changes_the_picture(subjects: Subjects) -> None:
    """0 and 1 differ too: diffusers embeds w = guidance - 1."""
    pictures = draw(
        subjects("full LCM of sd").engine, *(make_params(guidance_scale=scale) for scale in (0.0, 1.0, 8.0))
    )
    assert largest_difference(pictures[0], pictures[1]) > 1
    assert largest_difference(pictures[1], pictures[2]) > 1


def test_no_negative_prompt_is_not_an_empty_one_in_sdxl(subjects: Subjects) -> None:
    wishes = [make_params(guidance_scale=2.0, negative_prompt=negative) for negative in (None, "")]
    none, empty = draw(subjects("sdxl").engine, *wishes)
    assert largest_difference(none, empty) > 1


def test_another_size(engine: Engine, oracle: Oracle) -> None:
    params = make_params(width=48, height=32)
    assert largest_difference(draw(engine, params)[0], oracle.draw(params)) <= 1


def test_padding_changes_nothing(pipeline: FewStepPipeline, oracle: Oracle) -> None:
    engine = Engine({"small": ModelRunner(pipeline, padded_sizes=(4, 16))})
    all_params = [make_params(seed=seed) for seed in range(5)]
    for params, pixels in zip(all_params, draw(engine, *all_params), strict=True):
        assert largest_difference(pixels, oracle.draw(params)) <= 1


def test_image_i_of_a_request_is_the_picture_of_seed_plus_i(engine: Engine) -> None:
    grid, single = draw(engine, make_params(num_images=3, seed=20), make_params(seed=22))
    assert largest_difference(grid[2:], single) <= 1


def test_different_seeds_differ(engine: Engine) -> None:
    one, other = draw(engine, make_params(seed=1), make_params(seed=2))
    assert largest_difference(one, other) > 20


def test_in_bfloat16_a_picture_hardly_depends_on_who_shares_the_batch(spec: ModelSpec) -> None:
    """bfloat16 has 8 significant bits, and oneDNN rounds in another order for another number of rows."""
    engine = Engine({"small": ModelRunner(load_pipeline(spec, torch.device("cpu"), torch.bfloat16))})
    all_params = [make_params(**changes) for changes in PLAIN]
    for params, together in zip(all_params, draw(engine, *all_params), strict=True):
        (alone,) = draw(engine, params)
        assert largest_difference(alone, together) <= 4, params.prompt


def test_the_bundled_model_in_bfloat16_stays_near_diffusers() -> None:
    """The default format of CPUs that have it. Other prompts are further off: see docs/performance.md."""
    spec = get_spec(load_catalog(), "mini-lcm")
    cpu, prompts = torch.device("cpu"), ["a red apple on a blue background", "a fox on a green background", "a panda"]
    all_params = [
        make_params(prompt=prompt, seed=seed, width=64, height=64, num_inference_steps=4 + seed)
        for seed, prompt in enumerate(prompts)
    ]
    oracle = load_diffusers(spec, cpu, torch.bfloat16)
    engine = Engine({"small": ModelRunner(load_pipeline(spec, cpu, torch.bfloat16))})
    for params, pixels in zip(all_params, draw(engine, *all_params), strict=True):
        generator = torch.Generator().manual_seed(params.seed)
        image = oracle(
            params.prompt, num_inference_steps=params.num_inference_steps, guidance_scale=0, generator=generator
        ).images[0]
        wanted = np.asarray(image)[None]
        assert largest_difference(pixels, wanted) <= 16
        assert np.abs(pixels.astype(int) - wanted.astype(int)).mean() <= 1
