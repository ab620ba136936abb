"""LitServe with its request batching around the same diffusers pipeline.

Requests that arrive within `--window-ms` share one call of the pipeline, up to `MAX_BATCH_SIZE` of them.
"""

import argparse
from dataclasses import dataclass

import litserve  # type: ignore[import-untyped]
import torch
from fastapi import Request, Response

from benchmarks.shared.diffusers_loop import draw, hush_libraries, parse_dtype
from models.catalog import get_spec, load_catalog
from models.loading import default_device, load_diffusers

MAX_BATCH_SIZE = 32
WARM_UP_SIZES = (1, 8, MAX_BATCH_SIZE)


@dataclass(frozen=True)
class Drawing:
    """What every picture has in common. `threads` are torch's in each worker; 0 leaves them at torch's default."""

    model: str
    dtype: str
    steps: int
    threads: int


class TextToImage(litserve.LitAPI):  # type: ignore[misc]
    def __init__(self, drawing: Drawing, window_ms: float) -> None:
        super().__init__(max_batch_size=MAX_BATCH_SIZE, batch_timeout=window_ms / 1000, api_path="/v1/generations")
        self.drawing = drawing

    def setup(self, _device: str) -> None:
        hush_libraries()
        if self.drawing.threads:
            torch.set_num_threads(self.drawing.threads)
        self.spec = get_spec(load_catalog(), self.drawing.model)
        self.pipe = load_diffusers(self.spec, default_device(), parse_dtype(self.drawing.dtype))
        for size in WARM_UP_SIZES:
            self.predict([("warm-up", seed) for seed in range(size)])

    def decode_request(self, request: Request) -> tuple[str, int]:
        # LitServe hands over the JSON body; it reads the annotation itself, so it can't be a string or anything else.
        return request["prompt"], request["seed"]

    def predict(self, batch: list[tuple[str, int]]) -> list[bytes]:
        prompts, seeds = zip(*batch, strict=True)
        return draw(self.pipe, self.spec, self.drawing.steps, prompts, seeds)

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="image/png")


def main() -> None:
    options = parse_options()
    drawing = Drawing(options.model, options.dtype, options.steps, options.threads)
    server = litserve.LitServer(
        TextToImage(drawing, options.window_ms),
        accelerator="auto",
        workers_per_device=options.workers,
        healthcheck_path="/readyz",
    )
    server.run(port=options.port, host="127.0.0.1", log_level="warning", generate_client_file=False)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--window-ms", type=float, default=10, help="LitServe's batch_timeout")
    parser.add_argument("--workers", type=int, default=1, help="processes with a pipeline each")
    parser.add_argument("--threads", type=int, default=0, help="torch threads of each; 0: as many as cores")
    return parser.parse_args()


if __name__ == "__main__":
    main()
