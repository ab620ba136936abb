"""Jobs and deliveries for tests, complete with defaults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import uuid4

from broker.messages import Delivery, Job, SamplingParams, SizeCosts, WarmModel


def make_params(**changes: Any) -> SamplingParams:
    values: dict[str, Any] = {
        "prompt": "a red apple",
        "negative_prompt": None,
        "width": 32,
        "height": 32,
        "num_inference_steps": 4,
        "guidance_scale": 0.0,
        "seed": 7,
        "scheduler": "lcm",
        "num_images": 1,
        "decoder": "full",
        "output_format": "png",
        "output_quality": 85,
        "previews": False,
        "metadata": True,
    }
    return SamplingParams(**(values | changes))


def make_job(request_id: str | None = None, *, model: str = "small", **params: Any) -> Job:
    return Job(
        request_id=request_id or uuid4().hex,
        model=model,
        params=make_params(**params),
        lane="api",
        owner="anonymous",
        gateway_id="gateway",
        keep_s=60,
    )


def make_delivery(
    request_id: str | None = None, *, is_last_attempt: bool = False, deadline_ms: int | None = None, **params: Any
) -> Delivery:
    job = replace(make_job(request_id, **params), deadline_ms=deadline_ms)
    return Delivery(job, attempt=1, waited_ms=0.0, is_last_attempt=is_last_attempt)


def make_warm(model: str = "small", **changes: Any) -> WarmModel:
    """What a worker measured; `changes` are fields of its only size's costs."""
    values: dict[str, Any] = {
        "width": 64,
        "height": 64,
        "max_rows": 8,
        "step_ms": {1: 10.0, 8: 40.0},
        "decode_ms": {1: 4.0, 8: 16.0},
        "preview_ms": {1: 1.0, 8: 4.0},
    }
    return WarmModel(model, "1", max_batch_size=8, text_ms=1.0, sizes=(SizeCosts(**(values | changes)),))
