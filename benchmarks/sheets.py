"""What each scheduler makes of the bundled model at 1 to 8 steps: a sheet of pictures, and how often they are right.

    python -m benchmarks.sheets -o docs/images/schedulers.webp        # about five minutes of two cores

Every cell draws the same prompts with the same seeds, through the engine, half of them of two things. Right means that
the recogniser of the model's own evaluation sees what was asked for, each thing in its place, on a background of the
colour that was asked for. Sharpness is its measure too. The last row is a control: the model without its LCM-LoRA, by
the solver and the guidance that suit it.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from benchmarks.diffusers_loop import hush_libraries
from benchmarks.machine import REPOSITORY
from benchmarks.report import write_report
from broker.messages import Delivery
from models.catalog import BUNDLED_PATH, ModelSpec, SchedulerSpec, get_spec, load_catalog
from models.loading import load_pipeline
from models.training.mini.judging import wilson
from models.training.mini.recognizer import MIN_CONTRAST, ColorNamer, Recognizer, sharpness
from models.training.mini.reference import Reference, load_reference
from workers.engine import Engine, Finished
from workers.engine.engine import run_until_done
from workers.engine.jobs import make_job
from workers.engine.runner import ModelRunner

STEPS = range(1, 9)
TRAILING = {"timestep_spacing": "trailing"}
LCM = {"original_inference_steps": 20}  # what the LoRA was distilled with
SCHEDULERS = {
    "lcm": SchedulerSpec(class_name="LCMScheduler", config=LCM),
    "tcd, eta 0": SchedulerSpec(class_name="TCDScheduler", config=LCM),
    "tcd, eta 0.3": SchedulerSpec(class_name="TCDScheduler", config=LCM, step={"eta": 0.3}),
    "dpm-solver": SchedulerSpec(class_name="DPMSolverMultistepScheduler", config=TRAILING),
    "unipc": SchedulerSpec(class_name="UniPCMultistepScheduler", config=TRAILING),
    "euler-ancestral": SchedulerSpec(class_name="EulerAncestralDiscreteScheduler", config=TRAILING),
    "ddim": SchedulerSpec(class_name="DDIMScheduler", config=TRAILING),
}
CONTROL = "no LoRA: dpm-solver"
CONTROL_GUIDANCE = 1.5
NUM_SHOWN = 2
MIN_STANDING_OUT = 0.85  # of a thing's pixels, or its prompt would be a riddle
LABEL_WIDTH, GAP, HEAD = 112, 4, 18

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Case:
    """One prompt, and the things and the colour that it asks for, by their places in the reference."""

    prompt: str
    things: tuple[int, ...]
    is_column: bool
    color: int


@dataclass(frozen=True)
class Cell:
    """One scheduler at one number of steps: the share of right pictures, the 95 % interval of it (Wilson), and
    the mean difference between neighbouring pixels in 0 to 255."""

    scheduler: str
    steps: int
    right: float
    low: float
    high: float
    sharpness: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-lcm")
    parser.add_argument("--prompts", type=int, default=80, help="per cell")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--schedulers", nargs="+", choices=[*SCHEDULERS, CONTROL], default=[*SCHEDULERS, CONTROL])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-sheets.json")
    options = parser.parse_args()
    hush_libraries()
    reference = load_reference(BUNDLED_PATH / "mini-sd" / "reference")
    cases = draw_lots(reference, options.prompts)
    spec = get_spec(load_catalog(), options.model)
    pictures = {row: draw_row(spec, row, options.steps, cases) for row in options.schedulers}
    cells = list(Judge(reference).judge(pictures, cases))
    print_cells("right pictures in percent (95 % interval)", cells, format_share)
    print_cells("sharpness", cells, lambda cell: f"{cell.sharpness:.1f}")
    make_sheet(pictures).save(options.output, quality=80, method=6)
    write_report(options.json, vars(options), {"cells": cells, "prompts": [case.prompt for case in cases]})


# Drawing


def draw_lots(reference: Reference, num_prompts: int) -> list[Case]:
    """Things and backgrounds by chance, always the same; every second prompt is of two things."""
    dice = random.Random(3)
    things = dice.sample(range(len(reference.names)), num_prompts + num_prompts // 2)
    return [make_case(reference, things, number, dice) for number in range(num_prompts)]


def make_case(reference: Reference, things: list[int], number: int, dice: random.Random) -> Case:
    """Takes its things from the end of the list."""
    chosen = tuple(things.pop() for _ in range(1 + number % 2))
    colors = list(reference.colors.values())
    shares = [
        min(standing_out(one, color) for thing in chosen for one in reference.drawings[thing]) for color in colors
    ]
    color = dice.choice([index for index, share in enumerate(shares) if share >= min(MIN_STANDING_OUT, max(shares))])
    is_column = number % 4 == 3
    words = (" above " if is_column else " next to ").join(with_article(reference.names[thing][0]) for thing in chosen)
    return Case(f"{words} on a {list(reference.colors)[color]} background", chosen, is_column, color)


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def standing_out(sprite: Image.Image, rgb: tuple[int, int, int]) -> float:
    """The share of a thing's pixels that differ from a background."""
    pixels = np.asarray(sprite, np.float32)
    visible = pixels[pixels[..., 3] > 128][:, :3]
    return float((np.abs(visible - np.asarray(rgb)).max(axis=1) > MIN_CONTRAST).mean())


def draw_row(spec: ModelSpec, row: str, steps: Sequence[int], cases: Sequence[Case]) -> dict[int, list[Pixels]]:
    """The pictures of all cases by number of steps."""
    is_control = row == CONTROL
    name = row.removeprefix("no LoRA: ")
    changes = {"schedulers": {name: SCHEDULERS[name]}, "default_scheduler": name}
    own = spec.model_copy(update=changes | ({"lora": None} if is_control else {}))
    engine = Engine({spec.name: ModelRunner(load_pipeline(own, torch.device("cpu"), torch.float32))})
    guidance = CONTROL_GUIDANCE if is_control else 0.0
    return {count: draw_cell(engine, own, count, guidance, cases) for count in steps}


def draw_cell(engine: Engine, spec: ModelSpec, steps: int, guidance: float, cases: Sequence[Case]) -> list[Pixels]:
    for index, case in enumerate(cases):
        wishes = {"num_inference_steps": steps, "guidance_scale": guidance, "seed": 1000 + index}
        engine.add(Delivery(make_job(spec, str(index), case.prompt, **wishes), attempt=1, waited_ms=0))
    finished = [output for output in run_until_done(engine) if isinstance(output, Finished)]
    finished.sort(key=lambda output: int(output.request.request_id))
    return [output.pixels[0] for output in finished]


# Judging


class Judge:
    """Sees what is in a picture."""

    def __init__(self, reference: Reference) -> None:
        self._recognizer = Recognizer(reference.drawings)
        self._namer = ColorNamer(list(reference.colors.values()))

    def judge(self, pictures: Mapping[str, Mapping[int, Sequence[Pixels]]], cases: Sequence[Case]) -> Iterator[Cell]:
        for row, columns in pictures.items():
            for steps, cell in columns.items():
                right = sum(self.is_right(case, picture) for case, picture in zip(cases, cell, strict=True))
                looks = statistics.fmean(sharpness(picture) for picture in cell)
                yield Cell(row, steps, right / len(cell), *wilson(right, len(cell)), looks)

    def is_right(self, case: Case, picture: Pixels) -> bool:
        return (self._see(case, picture), self._namer.name(picture)) == (case.things, case.color)

    def _see(self, case: Case, picture: Pixels) -> tuple[int | None, ...]:
        if len(case.things) == 1:
            return (self._recognizer.single(picture),)
        return self._recognizer.pair(picture, vertical=case.is_column)


def print_cells(title: str, cells: Sequence[Cell], show: Callable[[Cell], str]) -> None:
    steps = list(dict.fromkeys(cell.steps for cell in cells))
    print(f"\n| {title} | {' | '.join(map(str, steps))} |\n| --- |{' ---: |' * len(steps)}")
    for row in dict.fromkeys(cell.scheduler for cell in cells):
        print(f"| {row} | {' | '.join(show(cell) for cell in cells if cell.scheduler == row)} |")


def format_share(cell: Cell) -> str:
    return f"{cell.right * 100:.0f} ({cell.low * 100:.0f} to {cell.high * 100:.0f})"


# The sheet


def make_sheet(pictures: Mapping[str, Mapping[int, Sequence[Pixels]]]) -> Image.Image:
    """Schedulers down, steps across, the first pictures of each cell."""
    first = next(iter(next(iter(pictures.values())).values()))[0]
    height, width = first.shape[0], NUM_SHOWN * first.shape[1]
    steps = list(next(iter(pictures.values())))
    size = LABEL_WIDTH + len(steps) * (width + GAP), HEAD + len(pictures) * (height + GAP)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for column, count in enumerate(steps):
        pen.text((LABEL_WIDTH + column * (width + GAP), 2), f"{count} step{'s' * (count > 1)}", "black", font)
    for line, (row, columns) in enumerate(pictures.items()):
        top = HEAD + line * (height + GAP)
        pen.multiline_text((2, top + height // 2 - 14), row.replace(": ", ":\n"), "black", font)
        for column, cell in enumerate(columns.values()):
            shown = np.concatenate(cell[:NUM_SHOWN], axis=1)
            sheet.paste(Image.fromarray(shown), (LABEL_WIDTH + column * (width + GAP), top))
    return sheet


if __name__ == "__main__":
    main()
