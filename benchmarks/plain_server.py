"""The server that people write today: FastAPI, one diffusers pipeline, a lock around it.

Handlers are plain functions, so FastAPI runs them in its thread pool and the event loop stays free.
"""

from __future__ import annotations

import argparse
import threading

import torch
import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel

from benchmarks.diffusers_loop import draw, hush_libraries, parse_dtype
from models.catalog import get_spec, load_catalog
from models.loading import default_device, load_diffusers


class Body(BaseModel):
    prompt: str
    seed: int
    num_inference_steps: int = 4


def create_app(model: str, dtype: str) -> FastAPI:
    app = FastAPI()
    spec = get_spec(load_catalog(), model)
    pipe = load_diffusers(spec, default_device(), parse_dtype(dtype))
    draw(pipe, spec, spec.num_inference_steps.default, ["warm-up"], seeds=[0])
    lock = threading.Lock()

    @app.get("/readyz")
    def ready() -> str:
        return "ready"

    @app.post("/v1/generations")
    def generate(body: Body) -> Response:
        with lock:
            (data,) = draw(pipe, spec, body.num_inference_steps, [body.prompt], [body.seed])
        return Response(data, media_type="image/png")

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    hush_libraries()
    torch.set_num_threads(options.threads)
    uvicorn.run(create_app(options.model, options.dtype), port=options.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
