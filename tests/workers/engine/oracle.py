"""diffusers' own pipeline, called alone with the same seed: what the engine's pictures are held against."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import diffusers
import numpy as np
import torch

from broker.messages import SamplingParams
from models.catalog import ModelSpec
from tests.jobs import make_delivery
from workers.engine import Engine, Finished
from workers.engine.engine import run_until_done
from workers.engine.outputs import Pixels

PIPELINES = {
    "sd": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "consistency": diffusers.ConsistencyModelPipeline,
}


class Oracle:
    """The pipeline that diffusers has for the entry's family, loaded by diffusers alone; for a full LCM of Stable
    Diffusion its LCM pipeline. The entry's sources are local folders."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype = torch.float32) -> None:
        self._spec = spec
        self._pipe = _load(spec, dtype)
        self._config = _scheduler_config(spec.source)
        self.draw = cache(self._draw)  # of the same parameters the same picture
        if spec.guidance_embedded and spec.family == "sd":
            parts = self._pipe.components | {"scheduler": diffusers.LCMScheduler.from_config(self._config)}
            self._pipe = diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
        self._pipe.set_progress_bar_config(disable=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # that there are several is the point
            for name, entry in spec.loras.items():
                self._pipe.load_lora_weights(entry.source, weight_name=entry.weight_name, adapter_name=name)

    def _draw(self, params: SamplingParams) -> Pixels:
        scheduler = self._spec.schedulers[params.scheduler]
        scheduler_class: Any = getattr(diffusers, scheduler.class_name)
        self._pipe.scheduler = scheduler_class.from_config(self._config, **scheduler.config)
        self._use_loras(params)
        timesteps = scheduler.timesteps.get(params.num_inference_steps)
        images = self._pipe(
            **(_class_of(params, self._spec) if self._spec.classes else _text_of(params)),
            **({"num_inference_steps": params.num_inference_steps} if timesteps is None else {"timesteps": timesteps}),
            generator=[torch.Generator().manual_seed(params.seed + i) for i in range(params.num_images)],
        ).images
        return np.stack([np.asarray(image) for image in images])

    def _use_loras(self, params: SamplingParams) -> None:
        if params.loras:
            self._pipe.enable_lora()
            self._pipe.set_adapters([lora.name for lora in params.loras], [lora.weight for lora in params.loras])
        elif self._spec.loras:
            self._pipe.disable_lora()


def _load(spec: ModelSpec, dtype: torch.dtype) -> Any:
    parts = {"unet": diffusers.UNet2DConditionModel.from_pretrained(spec.unet, dtype=dtype)} if spec.unet else {}
    pipe: Any = PIPELINES[spec.family].from_pretrained(spec.source, dtype=dtype, **parts)
    if spec.lora is not None:
        pipe.load_lora_weights(spec.lora.source)
        pipe.fuse_lora(lora_scale=spec.lora.scale)
        pipe.unload_lora_weights()  # what is fused stays
    return pipe


def _scheduler_config(folder: str) -> Any:
    """As the folder's own scheduler reads it."""
    class_name = diffusers.DDIMScheduler.load_config(folder, subfolder="scheduler")["_class_name"]
    return getattr(diffusers, class_name).from_pretrained(folder, subfolder="scheduler").config


def _text_of(params: SamplingParams) -> dict[str, Any]:
    return {
        "prompt": params.prompt,
        "guidance_scale": params.guidance_scale,
        "num_images_per_prompt": params.num_images,
        "width": params.width,
        "height": params.height,
        **({} if params.negative_prompt is None else {"negative_prompt": params.negative_prompt}),
    }


def _class_of(params: SamplingParams, spec: ModelSpec) -> dict[str, Any]:
    assert spec.class_names is not None
    number = spec.class_names.find(params.prompt)
    return {"class_labels": [number] * params.num_images, "batch_size": params.num_images}


def draw(engine: Engine, *all_params: SamplingParams) -> list[Pixels]:
    """The engine's pictures, all requests at once, in the order asked for."""
    (model,) = engine.runners
    for index, params in enumerate(all_params):
        delivery = make_delivery(str(index))
        engine.add(replace(delivery, job=replace(delivery.job, model=model, params=params)))
    finished = {output.request.request_id: output for output in run_until_done(engine) if isinstance(output, Finished)}
    return [finished[str(index)].pixels for index in range(len(all_params))]


def largest_difference(one: Pixels, other: Pixels) -> int:
    """Of 255, over all pixels."""
    assert one.shape == other.shape
    assert one.std() > 5, "a constant picture would equal anything"
    return int(np.abs(one.astype(int) - other.astype(int)).max())
