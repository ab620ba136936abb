from __future__ import annotations

from typing import Any

import pytest

from app.errors import InvalidRequest
from app.parameters import Defaults, check_size_text, complete, draw_seed, find_warnings
from app.schemas import GenerationFields
from broker.messages import MAX_SEED
from models.catalog import ModelSpec, Range, SchedulerSpec, load_catalog

DEFAULTS = Defaults(output_format="jpeg")


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return load_catalog()["mini-lcm"]


@pytest.fixture(scope="module")
def wide_spec() -> ModelSpec:
    return load_catalog()["sd15-lcm"]


@pytest.fixture(scope="module")
def class_spec(spec: ModelSpec) -> ModelSpec:
    """Of a model that draws ImageNet's classes."""
    changes: dict[str, Any] = {
        "name": "cm",
        "family": "consistency",
        "guidance": "none",
        "guidance_scale": Range(default=0, min=0, max=0),
        "classes": "imagenet",
        "schedulers": {"cm": SchedulerSpec(class_name="CMStochasticIterativeScheduler")},
        "default_scheduler": "cm",
        "tiny_vae": None,
        "lora": None,
    }
    return ModelSpec(**(spec.model_dump() | changes))


def fields(**values: Any) -> GenerationFields:
    return GenerationFields(**{"prompt": "a red apple", **values})


def test_everything_is_filled_in(spec: ModelSpec) -> None:
    params = complete(fields(), spec, DEFAULTS)
    assert (params.width, params.height, params.num_inference_steps) == (64, 64, 4)
    assert (params.scheduler, params.guidance_scale, params.num_images) == ("lcm", 0.0, 1)
    assert (params.output_format, params.output_quality, params.decoder) == ("jpeg", 85, "full")
    assert (params.previews, params.metadata) == (False, True)
    assert 0 <= params.seed <= MAX_SEED


def test_seeds_are_drawn_and_kept(spec: ModelSpec) -> None:
    assert complete(fields(), spec, DEFAULTS).seed != complete(fields(), spec, DEFAULTS).seed
    assert complete(fields(seed=0), spec, DEFAULTS).seed == 0
    assert complete(fields(), spec, Defaults("jpeg", seed=5)).seed == 5
    assert all(draw_seed(9) + 8 <= MAX_SEED for _ in range(100))


@pytest.mark.parametrize(
    ("values", "param", "allowed"),
    [
        ({"prompt": " \n "}, "prompt", "it must say something"),
        ({"prompt": "x" * 501}, "prompt", "at most 500 characters, it has 501"),
        ({"negative_prompt": "x" * 501}, "negative_prompt", "at most 500 characters"),
        ({"width": 65}, "width", "sizes of mini-lcm: 64x64"),
        ({"height": 512}, "height", "sizes of mini-lcm: 64x64"),
        ({"num_inference_steps": 51}, "num_inference_steps", "1 to 20"),
        ({"guidance_scale": 2.5}, "guidance_scale", "0 to 2: few-step models need no guidance"),
        ({"scheduler": "heun"}, "scheduler", "lcm, ddim, euler-ancestral"),
        ({"num_images": 10}, "num_images", "1 to 9"),
        ({"seed": MAX_SEED, "num_images": 2}, "seed", str(MAX_SEED)),
        ({"loras": [{"name": "etching"}]}, "loras.0.name", "mini-lcm has neon, sketch"),
    ],
)
def test_what_the_model_does_not_allow(spec: ModelSpec, values: dict[str, Any], param: str, allowed: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        complete(fields(**values), spec, DEFAULTS)
    assert caught.value.param == param
    assert str(caught.value).startswith(f"{param}: ")
    assert allowed in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("guidance", "limits", "scale", "words"),
    [
        ("classifier-free", (0, 0, 2), 3.0, "0 to 2: few-step models need no guidance, and oversaturate with more"),
        ("classifier-free", (1, 1, 2), 0.5, "1 to 2: it follows the prompt too loosely with less"),
        ("classifier-free", (7.5, 2, 12), 1.0, "2 to 12: it follows the prompt too loosely with less"),
        ("classifier-free", (7.5, 2, 12), 13.0, "2 to 12: it oversaturates with more"),
        ("embedded", (8, 3, 13), 1.0, "3 to 13: the scale is an input of its network"),
        ("none", (0, 0, 0), 2.0, "allows 0: it was distilled without guidance"),
    ],
)
def test_why_a_guidance_scale_is_out_of_range(
    spec: ModelSpec, guidance: str, limits: tuple[float, float, float], scale: float, words: str
) -> None:
    default, least, most = limits
    allowed = Range(default=default, min=least, max=most)
    own = spec.model_copy(update={"guidance": guidance, "guidance_scale": allowed})
    with pytest.raises(InvalidRequest, match=words):
        complete(fields(guidance_scale=scale), own, DEFAULTS)


def test_sizes_from_one_side(wide_spec: ModelSpec) -> None:
    assert complete(fields(width=640), wide_spec, DEFAULTS).height == 448
    assert complete(fields(height=640), wide_spec, DEFAULTS).width == 448
    with pytest.raises(InvalidRequest, match="'640x512' is not allowed; sizes of sd15-lcm: 512x512, 448x576, 576x448"):
        complete(fields(width=640, height=512), wide_spec, DEFAULTS)


def test_openai_sizes(wide_spec: ModelSpec) -> None:
    assert check_size_text("auto", wide_spec) == check_size_text(None, wide_spec) == (512, 512)
    assert check_size_text("448x640", wide_spec) == (448, 640)
    with pytest.raises(InvalidRequest, match="'1024x1024' is not allowed; sizes of sd15-lcm: auto, 512x512"):
        check_size_text("1024x1024", wide_spec)


def test_decoders(spec: ModelSpec) -> None:
    quick = Defaults("jpeg", decoder="tiny")
    assert complete(fields(decoder="auto"), spec, DEFAULTS).decoder == "full"
    assert complete(fields(), spec, quick).decoder == "tiny"
    assert complete(fields(decoder="full"), spec, quick).decoder == "full"
    without_tiny = spec.model_copy(update={"tiny_vae": None})
    assert complete(fields(), without_tiny, quick).decoder == "full"
    with pytest.raises(InvalidRequest, match="only the full decoder"):
        complete(fields(decoder="tiny"), without_tiny, DEFAULTS)


def test_a_negative_prompt_without_guidance_is_told(spec: ModelSpec) -> None:
    assert "no effect" in find_warnings(complete(fields(negative_prompt="blur"), spec, DEFAULTS), spec)[0]
    assert not find_warnings(complete(fields(negative_prompt="blur", guidance_scale=2), spec, DEFAULTS), spec)
    assert not find_warnings(complete(fields(negative_prompt=""), spec, DEFAULTS), spec)


@pytest.mark.parametrize("prompt", ["golden retriever", "a Golden  Retriever", "class 207", "207"])
def test_the_prompt_of_a_class_conditional_model_is_a_class(class_spec: ModelSpec, prompt: str) -> None:
    params = complete(fields(prompt=prompt), class_spec, DEFAULTS)
    assert (params.prompt, params.guidance_scale, params.decoder) == (prompt, 0.0, "full")
    assert find_warnings(params, class_spec) == ()


@pytest.mark.parametrize(
    ("prompt", "allowed"),
    [
        ("goldfsh", "cm draws classes, by name or as class 0 to class 999; near names: goldfish, goldfinch"),
        ("class 1000", "cm draws classes, by name or as class 0 to class 999; no name is near"),
    ],
)
def test_a_prompt_that_names_no_class_is_refused_with_near_names(
    class_spec: ModelSpec, prompt: str, allowed: str
) -> None:
    with pytest.raises(InvalidRequest, match=allowed) as caught:
        complete(fields(prompt=prompt), class_spec, DEFAULTS)
    assert (caught.value.param, caught.value.code) == ("prompt", "unknown_class")


def test_a_name_of_several_classes_gives_a_warning(class_spec: ModelSpec) -> None:
    params = complete(fields(prompt="panda"), class_spec, DEFAULTS)
    assert find_warnings(params, class_spec) == (
        "prompt names several classes: drawn is class 388 (giant panda, panda); "
        "there is also class 387 (lesser panda, red panda)",
    )


def test_what_a_class_conditional_model_has_no_use_for(class_spec: ModelSpec) -> None:
    params = complete(fields(prompt="zebra", negative_prompt="a horse"), class_spec, DEFAULTS)
    assert find_warnings(params, class_spec) == ("negative_prompt has no effect: cm was distilled without guidance",)
    for wish, allowed in (({"guidance_scale": 2}, "allows 0: it was"), ({"decoder": "tiny"}, "only the full decoder")):
        with pytest.raises(InvalidRequest, match=allowed):
            complete(fields(prompt="zebra", **wish), class_spec, DEFAULTS)
