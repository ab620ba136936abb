"""A sheet of pictures by the bundled model, drawn by the engine: what the README and docs/models.md show.

python -m benchmarks.samples -o docs/images/samples.png
python -m benchmarks.samples --lora none --lora neon:0.5 --lora neon --lora sketch:0.5 --lora sketch --columns 6 \
    -o docs/images/loras.webp
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from app.parameters import Defaults, complete
from app.schemas import GenerationFields, LoraChoice
from broker.messages import Delivery, Job
from models.catalog import ModelSpec, get_spec, load_catalog
from models.loading import load_pipeline
from workers.engine import Engine, Finished
from workers.engine.engine import run_until_done
from workers.engine.runner import ModelRunner

SCALE = 2
GAP = 4

Look = list[LoraChoice]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", nargs="*", help="the model's example prompts if none are given")
    parser.add_argument("--model", default="mini-lcm")
    parser.add_argument("--columns", type=int, default=5)
    parser.add_argument(
        "--lora",
        dest="looks",
        action="append",
        type=read_look,
        metavar="NAME[:WEIGHT][,...]",
        help="style LoRAs; each --lora draws one picture per column anew, --lora none without any",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    spec = get_spec(load_catalog(), options.model)
    prompts = options.prompts or spec.example_prompts
    if options.looks:
        prompts = prompts[: options.columns]
    pictures = draw(spec, [(prompt, look) for look in options.looks or [[]] for prompt in prompts], options.seed)
    make_sheet(pictures, options.columns).save(options.output, quality=80, method=6)


def read_look(text: str) -> Look:
    """The LoRAs of one --lora: "neon:0.5,sketch:0.5", or "none"."""
    choices = [choice.partition(":") for choice in text.split(",")] if text != "none" else []
    return [LoraChoice(name=name, weight=float(weight) if weight else None) for name, _, weight in choices]


def draw(spec: ModelSpec, wishes: Sequence[tuple[str, Look]], seed: int) -> list[Image.Image]:
    """One picture per prompt and its LoRAs, all of the same seed."""
    engine = Engine({spec.name: ModelRunner(load_pipeline(spec, torch.device("cpu"), torch.float32))})
    for index, (prompt, look) in enumerate(wishes):
        fields = GenerationFields(prompt=prompt, seed=seed, loras=look)
        params = complete(fields, spec, Defaults(output_format="png"))
        job = Job(str(index), spec.name, params, lane="api", owner="", gateway_id=None, keep_s=0)
        engine.add(Delivery(job, attempt=1, waited_ms=0))
    outputs = [output for output in run_until_done(engine) if isinstance(output, Finished)]
    outputs.sort(key=lambda output: int(output.request.request_id))
    return [Image.fromarray(output.pixels[0]) for output in outputs]


def make_sheet(pictures: list[Image.Image], columns: int) -> Image.Image:
    """The pictures in rows, enlarged smoothly, with white gaps."""
    width, height = (SCALE * side + GAP for side in pictures[0].size)
    rows = -(-len(pictures) // columns)
    sheet = Image.fromarray(np.full((rows * height - GAP, columns * width - GAP, 3), 255, np.uint8))
    for index, picture in enumerate(pictures):
        enlarged = picture.resize((SCALE * picture.width, SCALE * picture.height), Image.Resampling.BICUBIC)
        sheet.paste(enlarged, (index % columns * width, index // columns * height))
    return sheet


if __name__ == "__main__":
    main()
