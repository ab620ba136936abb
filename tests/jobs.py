"""Jobs and deliveries for tests, complete with defaults."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from broker.messages import Delivery, Job, SamplingParams


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


def make_delivery(request_id: str | None = None, *, is_last_attempt: bool = False, **params: Any) -> Delivery:
    job = make_job(request_id, **params)
    return Delivery(job, attempt=1, waited_ms=0.0, is_last_attempt=is_last_attempt)
