"""Style LoRAs per request. diffusers' own pipeline with adapters of the same names and weights is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from broker.messages import LoraWeight, SamplingParams
from models.catalog import ModelSpec
from models.loading import load_pipeline
from tests.jobs import make_params
from tests.small_models import small_sdxl_spec, small_spec
from tests.style_loras import ATTENTION, TEXT, WITH_CONVOLUTIONS, by_name, style, write_lora
from tests.workers.engine.oracle import Oracle, draw, largest_difference
from workers.engine import Engine
from workers.engine.runner import ModelRunner

Loras = dict[str, float]

CPU = torch.device("cpu")


def sd_spec(root: Path) -> ModelSpec:
    """With a fused LCM-LoRA below."""
    spec = small_spec(root)
    base, folder = Path(spec.source), root / "styles"
    return spec.model_copy(
        update={
            "loras": by_name(
                style(write_lora(folder / "ink.safetensors", base, {"unet": ATTENTION}, seed=10)),
                style(write_lora(folder / "clay.safetensors", base, {"unet": WITH_CONVOLUTIONS}, "diffusers", seed=11)),
                style(
                    write_lora(folder / "mood.safetensors", base, {"unet": ATTENTION, "text_encoder": TEXT}, seed=12)
                ),
                style(
                    write_lora(
                        folder / "kohya.safetensors",
                        base,
                        {"unet": WITH_CONVOLUTIONS, "text_encoder": TEXT},
                        "kohya",
                        alpha=2.0,
                        seed=13,
                    )
                ),
            )
        }
    )


def sdxl_spec(root: Path) -> ModelSpec:
    spec = small_sdxl_spec(root)
    base, folder = Path(spec.source), root / "sdxl-styles"
    everything = {"unet": ATTENTION, "text_encoder": TEXT, "text_encoder_2": TEXT}
    return spec.model_copy(
        update={
            "loras": by_name(
                style(write_lora(folder / "ink.safetensors", base, {"unet": WITH_CONVOLUTIONS}, seed=20)),
                style(write_lora(folder / "mood.safetensors", base, everything, seed=21)),
                style(write_lora(folder / "kohya.safetensors", base, everything, "kohya", alpha=1.0, seed=22)),
            )
        }
    )


class Subject:
    def __init__(self, spec: ModelSpec) -> None:
        self.oracle = Oracle(spec)
        self.engine = Engine({"small": ModelRunner(load_pipeline(spec, CPU, torch.float32))})


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    root = tmp_path_factory.mktemp("styles")
    return {"sd": Subject(sd_spec(root)), "sdxl": Subject(sdxl_spec(root))}


def styled_params(loras: Loras, **changes: Any) -> SamplingParams:
    return make_params(loras=tuple(LoraWeight(*item) for item in sorted(loras.items())), **changes)


CASES: list[tuple[str, Loras, dict[str, Any]]] = [
    ("sd", {"ink": 1.0}, {}),
    ("sd", {"ink": 0.5, "clay": -0.7}, {}),
    ("sd", {"mood": 1.0}, {"guidance_scale": 2.0, "negative_prompt": "red"}),
    ("sd", {"kohya": 0.8}, {}),
    ("sd", {"kohya": 0.3, "mood": 0.6, "ink": 0.2}, {"num_images": 2}),
    ("sdxl", {"ink": 1.0}, {}),
    ("sdxl", {"mood": 0.7, "ink": 0.4}, {}),
    ("sdxl", {"kohya": 1.0}, {"guidance_scale": 2.0}),
]


@pytest.mark.parametrize(("family", "loras", "changes"), CASES, ids=[f"{f}-{'-'.join(x)}" for f, x, _ in CASES])
def test_a_picture_is_that_of_diffusers_with_the_same_adapters(
    subjects: dict[str, Subject], family: str, loras: Loras, changes: dict[str, Any]
) -> None:
    params = styled_params(loras, **changes)
    plain, styled = draw(subjects[family].engine, make_params(**changes), params)
    assert largest_difference(styled, subjects[family].oracle.draw(params)) <= 1
    assert largest_difference(styled, plain) > 5, "it must change the picture"
    assert largest_difference(plain, subjects[family].oracle.draw(make_params(**changes))) <= 1
