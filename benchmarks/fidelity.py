"""How well the bundled models draw what they are asked for: by steps, scheduler and guidance, with intervals.

    python -m benchmarks.fidelity                              # every question, about half an hour of two cores
    python -m benchmarks.fidelity --questions steps control    # some of them

All pictures come out of the service's own engine. No prompt's combination (a thing on a background, a thing in a
colour, two neighbours) was in the training data. The judge compares with the drawings themselves and shares no feature
with any network (`models/training/mini/judging.py`). Two rows bound the measure: painted pictures, and those after the
autoencoder.

Columns: the share of right objects (and of those among the five nearest), shapes, recoloured objects, pairs with both
things in their places, and backgrounds, in percent with the 95 % interval of Wilson; sharpness, the mean difference
between neighbouring pixels, of 255; diversity, the mean difference between pictures of one prompt with other seeds, of
255; and the milliseconds of one picture alone, the median of twelve.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from benchmarks.diffusers_loop import hush_libraries
from benchmarks.jobs import make_job
from benchmarks.machine import REPOSITORY
from benchmarks.report import print_table, write_report
from broker.messages import Delivery
from models.catalog import BUNDLED_PATH, ModelSpec, SchedulerSpec, get_spec, load_catalog
from models.loading import load_pipeline
from models.training.mini.dataset import Composer, Pixels
from models.training.mini.judging import Case, CaseMaker, Judge, Kind, Verdict, check_reference, wilson
from models.training.mini.pixels import to_pixels, to_tensor
from models.training.mini.recognizer import sharpness
from models.training.mini.reference import load_reference
from models.training.mini.vocabulary import load_vocabulary
from workers.engine import Engine, Finished
from workers.engine.engine import run_until_done
from workers.engine.runner import ModelRunner

BASE = get_spec(load_catalog(), "mini-lcm")
TRAILING = {"timestep_spacing": "trailing"}
SCHEDULERS = {
    **BASE.schedulers,
    "tcd, eta 0": SchedulerSpec(class_name="TCDScheduler", config={"original_inference_steps": 20}),
    "unipc": SchedulerSpec(class_name="UniPCMultistepScheduler", config=TRAILING),
}
TEACHER = "mini-sd"
TEACHER_SCHEDULER, TEACHER_GUIDANCE, TEACHER_STEPS = "ddim", 2.0, 25
SEEDS_PER_PROMPT, DIVERSE_PROMPTS, TIMED_PICTURES = 8, 12, 12
KINDS: tuple[Kind, ...] = ("object", "shape", "tinted", "pair")


@dataclass(frozen=True)
class Setting:
    """One way to draw. `mini-sd` is `mini-lcm` without its LoRA."""

    model: str
    scheduler: str
    steps: int
    guidance: float
    decoder: str = "full"

    def __str__(self) -> str:
        decoder = f", {self.decoder} decoder" if self.decoder != "full" else ""
        return f"{self.model}, {self.scheduler}, {self.steps} steps, guidance {self.guidance:g}{decoder}"


def steps_question() -> list[Setting]:
    return [Setting("mini-lcm", "lcm", steps, 0) for steps in (1, 2, 4, 8, 25)]


def control_question() -> list[Setting]:
    """The teacher at its best, and at few steps without any distillation, by its own solver and by LCM's."""
    own = [Setting(TEACHER, TEACHER_SCHEDULER, steps, TEACHER_GUIDANCE) for steps in (1, 2, 4, 8, TEACHER_STEPS)]
    return [*own, *(Setting(TEACHER, "lcm", steps, 0) for steps in (1, 2, 4, 8))]


def scheduler_question() -> list[Setting]:
    return [Setting("mini-lcm", name, steps, 0) for name in SCHEDULERS for steps in (2, 4, 8)]


def guidance_question() -> list[Setting]:
    return [Setting("mini-lcm", "lcm", 4, guidance) for guidance in (0, 1, 1.5, 2)]


def decoder_question() -> list[Setting]:
    return [Setting("mini-lcm", "lcm", 4, 0, "tiny")]


QUESTIONS: dict[str, Callable[[], list[Setting]]] = {
    "steps": steps_question,
    "control": control_question,
    "schedulers": scheduler_question,
    "guidance": guidance_question,
    "decoder": decoder_question,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument(
        "--prompts", type=int, default=100, help="of each kind: objects, shapes, recoloured ones, pairs"
    )
    parser.add_argument("--sheets", type=Path, help="folder for a sheet of pictures per row")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-fidelity.json")
    options = parser.parse_args()
    hush_libraries()
    bench = Bench(options.prompts, options.sheets)
    rows = bench.bounds()
    settings = dict.fromkeys(setting for question in options.questions for setting in QUESTIONS[question]())
    rows += [bench.measure(setting) for setting in settings]
    print_table(rows)
    write_report(options.json, vars(options), {"rows": rows, "prompts": [case.prompt for case in bench.cases]})


@dataclass(frozen=True)
class Share:
    """How many of how many are right."""

    right: int
    of: int

    def __str__(self) -> str:
        if not self.of:
            return "-"
        low, high = wilson(self.right, self.of)
        return f"{100 * self.right / self.of:.0f} ({100 * low:.0f} to {100 * high:.0f})"


@dataclass(frozen=True)
class Row:
    pictures: str
    object: Share
    object_top5: Share
    shape: Share
    tinted: Share
    pair: Share
    background: Share
    sharpness: float
    diversity: float | None
    ms: float | None


class Bench:
    """The prompts, the judge, and one engine per model."""

    def __init__(self, prompts: int, sheets: Path | None) -> None:
        self.vocabulary, self.reference = load_vocabulary(), load_reference(BUNDLED_PATH / "mini-sd" / "reference")
        check_reference(self.reference, self.vocabulary)
        self.cases = CaseMaker(self.vocabulary, self.reference.drawings).cases(prompts)
        self.judge = Judge(self.vocabulary, self.reference.drawings)
        self.sheets = sheets
        self.engines: dict[str, Engine] = {}

    def bounds(self) -> list[Row]:
        """What no model can beat: painted pictures, and the same through the autoencoder and back."""
        composer, rng = Composer(self.vocabulary, self.reference.drawings), random.Random(5)
        painted = [composer.compose(case.scene, rng) for case in self.cases]
        rebuilt = rebuild(painted)
        return [self._row("painted", painted), self._row("painted, through the autoencoder", rebuilt)]

    def measure(self, setting: Setting) -> Row:
        """Draw everything that one row needs, and judge it."""
        draw = Painter(self.engine(setting.model), spec_of(setting.model), setting)
        pictures = draw.batch([(case.prompt, case.seed) for case in self.cases])
        return self._row(str(setting), pictures, diversity(draw, self.cases), milliseconds(draw, self.cases))

    def engine(self, model: str) -> Engine:
        if model not in self.engines:
            pipeline = load_pipeline(spec_of(model), torch.device("cpu"), torch.float32)
            self.engines[model] = Engine({spec_of(model).name: ModelRunner(pipeline)})
        return self.engines[model]

    def _row(
        self, name: str, pictures: Sequence[Pixels], diversity: float | None = None, ms: float | None = None
    ) -> Row:
        verdicts = [self.judge.judge(case, picture) for case, picture in zip(self.cases, pictures, strict=True)]
        print(f"- {name}", flush=True)
        if self.sheets is not None:
            save_sheet(pictures, self.sheets / f"{name}.webp")
        looks = statistics.fmean(sharpness(picture) for picture in pictures)
        return Row(name, *shares(self.cases, verdicts), looks, diversity, ms)


def shares(cases: Sequence[Case], verdicts: Sequence[Verdict]) -> Iterator[Share]:
    """In the order of Row's columns."""
    by_kind: dict[Kind, list[Verdict]] = {kind: [] for kind in KINDS}
    for case, verdict in zip(cases, verdicts, strict=True):
        by_kind[case.kind].append(verdict)
    objects, *others = by_kind.values()
    yield share(verdict.things for verdict in objects)
    yield share(verdict.near for verdict in objects)
    for other in others:
        yield share(verdict.things for verdict in other)
    yield share(verdict.background for verdict in verdicts)


def share(verdicts: Iterable[bool]) -> Share:
    answers = list(verdicts)
    return Share(sum(answers), len(answers))


def spec_of(model: str) -> ModelSpec:
    own = {"lora": None} if model == TEACHER else {}
    base = BASE if model == TEACHER else get_spec(load_catalog(), model)
    return base.model_copy(update={"schedulers": SCHEDULERS} | own)


class Painter:
    """Draws with one setting."""

    def __init__(self, engine: Engine, spec: ModelSpec, setting: Setting) -> None:
        self.engine = engine
        self.spec = spec
        self.wishes = {
            "num_inference_steps": setting.steps,
            "guidance_scale": setting.guidance,
            "scheduler": setting.scheduler,
            "decoder": setting.decoder,
        }

    def batch(self, asked: Sequence[tuple[str, int]]) -> list[Pixels]:
        """A picture for each prompt and seed, in their order, drawn together as far as the engine's batches reach."""
        for index, (prompt, seed) in enumerate(asked):
            job = make_job(self.spec, str(index), prompt, seed=seed, **self.wishes)
            self.engine.add(Delivery(job, attempt=1, waited_ms=0))
        finished = [output for output in run_until_done(self.engine) if isinstance(output, Finished)]
        finished.sort(key=lambda output: int(output.request.request_id))
        return [output.pixels[0] for output in finished]


def diversity(painter: Painter, cases: Sequence[Case]) -> float:
    """Mean difference between two pictures of one prompt, over some prompts for objects without a background."""
    names = [case.prompt.split(" on ")[0] for case in cases if case.kind == "object"][:DIVERSE_PROMPTS]
    means = []
    for name in names:
        pictures = [np.int16(picture) for picture in painter.batch([(name, seed) for seed in range(SEEDS_PER_PROMPT)])]
        means.append(statistics.fmean(float(np.abs(one - other).mean()) for one, other in combinations(pictures, 2)))
    return statistics.fmean(means)


def milliseconds(painter: Painter, cases: Sequence[Case]) -> float:
    """One picture alone, decoded, text encoded: the median."""
    times = []
    for case in cases[:TIMED_PICTURES]:
        start = perf_counter()
        painter.batch([(case.prompt, case.seed + 1)])
        times.append(1000 * (perf_counter() - start))
    return statistics.median(times)


@torch.no_grad()
def rebuild(pictures: Sequence[Pixels]) -> list[Pixels]:
    """Through the autoencoder of the base model and back."""
    vae = AutoencoderKL.from_pretrained(BUNDLED_PATH / "mini-sd", subfolder="vae", variant="fp16", dtype=torch.float32)
    batches = [pictures[start : start + 32] for start in range(0, len(pictures), 32)]
    return [picture for batch in batches for picture in to_pixels(vae(to_tensor(batch), sample_posterior=False).sample)]


def save_sheet(pictures: Sequence[Pixels], path: Path, columns: int = 20, number: int = 200) -> None:
    """The pictures spread evenly over all of them."""
    shown = pictures[:: max(1, len(pictures) // number)]
    side = shown[0].shape[0]
    page = Image.new("RGB", (columns * side, -(-len(shown) // columns) * side))
    for index, picture in enumerate(shown):
        page.paste(Image.fromarray(picture), (index % columns * side, index // columns * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, quality=85, method=6)


if __name__ == "__main__":
    main()
