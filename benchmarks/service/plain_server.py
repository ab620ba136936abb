"""The server that people write today: FastAPI, one diffusers pipeline, a lock around it.

Handlers are plain functions, so FastAPI runs them in its thread pool and the event loop stays free. With `--threads 0`
torch gets one thread or all cores, whichever draws faster in such a pool: often one, even where two are faster in the
main thread, because OpenMP's threads stop spinning once there are more of them than cores.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel

from benchmarks.shared.diffusers_loop import THREADS, Loop, Mode, draw, fastest, hush_libraries, parse_dtype
from models.catalog import get_spec, load_catalog
from models.loading import default_device, load_diffusers


class Body(BaseModel):
    prompt: str
    seed: int
    num_inference_steps: int = 4


def create_app(model: str, dtype: str, threads: int) -> FastAPI:
    app = FastAPI()
    spec = get_spec(load_catalog(), model)
    pipe = load_diffusers(spec, default_device(), parse_dtype(dtype))
    loop = Loop(pipe, spec, spec.num_inference_steps.default)
    torch.set_num_threads(choose_threads(loop, [threads] if threads else THREADS))
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


def choose_threads(loop: Loop, candidates: Sequence[int]) -> int:
    """The fastest in a second thread after the first has drawn, which also warms up."""
    modes = [Mode(threads, batch_size=1) for threads in candidates]
    loop.try_out(modes)
    with ThreadPoolExecutor(1) as pool:
        return fastest(pool.submit(loop.try_out, modes).result()).threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True, help="torch threads; 0: the faster of 1 and all cores")
    options = parser.parse_args()
    hush_libraries()
    app = create_app(options.model, options.dtype, options.threads)
    uvicorn.run(app, port=options.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
