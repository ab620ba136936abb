"""LitServe with its request batching around the same diffusers pipeline.

Requests that arrive within `BATCH_TIMEOUT_S` share one call of the pipeline, up to `MAX_BATCH_SIZE` of them.
"""

import argparse

import litserve  # type: ignore[import-untyped]
from fastapi import Request, Response

from benchmarks.diffusers_loop import draw, hush_libraries, parse_dtype
from models.catalog import get_spec, load_catalog
from models.loading import default_device, load_diffusers

MAX_BATCH_SIZE = 32
BATCH_TIMEOUT_S = 0.01


class TextToImage(litserve.LitAPI):  # type: ignore[misc]
    def __init__(self, model: str, dtype: str, steps: int) -> None:
        super().__init__(max_batch_size=MAX_BATCH_SIZE, batch_timeout=BATCH_TIMEOUT_S, api_path="/v1/generations")
        self.model, self.dtype, self.steps = model, dtype, steps

    def setup(self, _device: str) -> None:
        hush_libraries()
        self.spec = get_spec(load_catalog(), self.model)
        self.pipe = load_diffusers(self.spec, default_device(), parse_dtype(self.dtype))
        draw(self.pipe, self.spec, self.steps, ["warm-up"], seeds=[0])

    def decode_request(self, request: Request) -> tuple[str, int]:
        # LitServe hands over the JSON body; it reads the annotation itself, so it can't be a string or anything else.
        return request["prompt"], request["seed"]

    def predict(self, batch: list[tuple[str, int]]) -> list[bytes]:
        prompts, seeds = zip(*batch, strict=True)
        return draw(self.pipe, self.spec, self.steps, prompts, seeds)

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="image/png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    api = TextToImage(options.model, options.dtype, options.steps)
    server = litserve.LitServer(api, accelerator="auto", healthcheck_path="/readyz")
    server.run(port=options.port, host="127.0.0.1", log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
