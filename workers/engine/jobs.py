"""Requests that no client sent: for warm-up, check-ups and measurements."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from broker.messages import Job, SamplingParams
from models.catalog import ModelSpec


def make_job(spec: ModelSpec, request_id: str, prompt: str, **changes: Any) -> Job:
    """The model's defaults, without previews and metadata; `changes` are fields of SamplingParams."""
    params = replace(default_params(spec, prompt), **changes)
    return Job(request_id, spec.name, params, lane="api", owner="", gateway_id=None, keep_s=0)


def default_params(spec: ModelSpec, prompt: str) -> SamplingParams:
    """The model's, without previews and metadata."""
    width, height = spec.default_size
    return SamplingParams(
        prompt=prompt,
        negative_prompt=None,
        width=width,
        height=height,
        num_inference_steps=spec.num_inference_steps.default,
        guidance_scale=spec.guidance_scale.default,
        seed=0,
        scheduler=spec.default_scheduler,
        num_images=1,
        decoder="full",
        output_format="png",
        output_quality=85,
        previews=False,
        metadata=False,
    )
