"""How well the bundled models draw what they are asked for: by steps, scheduler and guidance, with intervals.

    python -m benchmarks.fidelity                              # every question, about half an hour of two cores
    python -m benchmarks.fidelity --questions steps control    # some of them
    python -m benchmarks.fidelity --questions --extra-catalog my-mini/catalog.toml    # what fewstep distill made

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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from time import perf_counter

import numpy as np

from benchmarks.shared.diffusers_loop import hush_libraries
from benchmarks.shared.machine import REPOSITORY
from benchmarks.shared.painting import (
    SCHEDULERS,
    TEACHER,
    TEACHER_XL,
    Painter,
    Setting,
    rebuild,
    save_gallery,
    save_sheet,
)
from benchmarks.shared.report import print_table, write_between, write_report
from models.catalog import BUNDLED_PATH, load_catalog
from models.training.mini.dataset import Composer, Pixels
from models.training.mini.judging import CASE_SEED, Case, CaseMaker, Judge, Kind, Verdict, check_reference, wilson
from models.training.mini.recognizer import sharpness
from models.training.mini.reference import load_reference
from models.training.mini.vocabulary import load_vocabulary

TEACHER_SCHEDULER, TEACHER_GUIDANCE, TEACHER_STEPS = "ddim", 3.0, 25
SEEDS_PER_PROMPT, DIVERSE_PROMPTS, TIMED_PICTURES = 8, 12, 12
SHOWN = 2  # pictures of each kind in a line of the gallery
MARKS = ("<!-- figures: start -->", "<!-- figures: end -->")
KINDS: tuple[Kind, ...] = ("object", "shape", "tinted", "pair")


def teacher_question() -> list[Setting]:
    """At which guidance, and from how many steps on, the teacher is at its best."""
    guided = [Setting(TEACHER, TEACHER_SCHEDULER, TEACHER_STEPS, guidance) for guidance in (1, 1.5, 2, 3, 4)]
    return [*guided, *(Setting(TEACHER, TEACHER_SCHEDULER, steps, TEACHER_GUIDANCE) for steps in (12, 50))]


def steps_question() -> list[Setting]:
    """Up to as many as LCM's scheduler has timesteps."""
    return [Setting("mini-lcm", "lcm", steps, 0) for steps in (1, 2, 4, 8, 20)]


def control_question(teacher: str = TEACHER) -> list[Setting]:
    """The teacher at its best, and at few steps without any distillation, by its own solver and by LCM's."""
    own = [Setting(teacher, TEACHER_SCHEDULER, steps, TEACHER_GUIDANCE) for steps in (1, 2, 4, 8, TEACHER_STEPS)]
    return [*own, *(Setting(teacher, "lcm", steps, 0) for steps in (1, 2, 4, 8))]


def scheduler_question() -> list[Setting]:
    return [Setting("mini-lcm", name, steps, 0) for name in SCHEDULERS for steps in (2, 4, 8)]


def guidance_question() -> list[Setting]:
    return [Setting("mini-lcm", "lcm", 4, guidance) for guidance in (0, 1, 1.5, 2)]


def decoder_question() -> list[Setting]:
    return [Setting("mini-lcm", "lcm", 4, 0, "tiny")]


def full_question() -> list[Setting]:
    """The full LCM by steps and by guidance scale, which its network reads."""
    by_steps = [Setting("mini-lcm-full", "lcm", steps, guidance) for guidance in (3, 5) for steps in (1, 2, 4, 8)]
    return [*by_steps, *(Setting("mini-lcm-full", "lcm", 4, guidance) for guidance in (2, 4))]


def turbo_question() -> list[Setting]:
    """Turbo by steps; its teacher at its best, and by the same solver without the LoRA."""
    best = Setting(TEACHER_XL, TEACHER_SCHEDULER, TEACHER_STEPS, TEACHER_GUIDANCE)
    turbo, teacher = (
        [Setting(model, "euler-ancestral", steps, 0) for steps in (1, 2, 4)] for model in ("mini-turbo", TEACHER_XL)
    )
    return [*turbo, best, *teacher]


def own_question(extra: Path) -> list[Setting]:
    """The models of a catalog file, as `fewstep distill` writes it for one of a bundled teacher."""
    bundled, found = load_catalog(), load_catalog(extra=extra)
    return [
        Setting(name, spec.default_scheduler, steps, spec.guidance_scale.default)
        for name, spec in found.items()
        for steps in (1, 2, 4, 8)
        if spec != bundled.get(name) and spec.num_inference_steps.min <= steps <= spec.num_inference_steps.max
    ]


QUESTIONS: dict[str, Callable[[], list[Setting]]] = {
    "teacher": teacher_question,
    "steps": steps_question,
    "control": control_question,
    "schedulers": scheduler_question,
    "guidance": guidance_question,
    "decoder": decoder_question,
    "control-xl": lambda: control_question(TEACHER_XL),
    "full": full_question,
    "turbo": turbo_question,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", nargs="*", choices=list(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--extra-catalog", type=Path, help="a catalog file whose models are measured too")
    parser.add_argument("--prompts", type=int, default=100, help="of each kind (objects, shapes, recoloured, pairs)")
    parser.add_argument("--seed", type=int, default=CASE_SEED, help="another one draws other prompts")
    parser.add_argument("--card", type=Path, help="text whose table to replace, such as a model card")
    parser.add_argument("--sheets", type=Path, help="folder for a sheet of pictures per row")
    parser.add_argument("--gallery", type=Path, help="one picture, with a line of pictures per row")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-fidelity.json")
    options = parser.parse_args()
    hush_libraries()
    bench = Bench(options.prompts, options.sheets, options.extra_catalog, options.seed)
    settings = dict.fromkeys(setting for question in options.questions for setting in QUESTIONS[question]())
    if options.extra_catalog is not None:
        settings |= dict.fromkeys(own_question(options.extra_catalog))
    rows = [*bench.bounds(), *map(bench.measure, settings)]
    table = print_table(rows)
    if options.card is not None:
        write_between(options.card, MARKS, table)
    if options.gallery is not None:
        save_gallery(bench.shown, options.gallery)
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
    """The columns of the table."""

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
    """The prompts, the judge and the painter."""

    def __init__(
        self, prompts: int, sheets: Path | None = None, extra_catalog: Path | None = None, seed: int = CASE_SEED
    ) -> None:
        self.vocabulary, reference = load_vocabulary(), load_reference(BUNDLED_PATH / "mini-sd" / "reference")
        check_reference(reference, self.vocabulary)
        self.drawings = reference.drawings
        self.cases = CaseMaker(self.vocabulary, self.drawings, seed).cases(prompts)
        self.judge = Judge(self.vocabulary, self.drawings)
        self.painter = Painter(extra_catalog)
        self.sheets = sheets
        self.shown: dict[str, list[Pixels]] = {}
        """By row, for the gallery."""

    def bounds(self) -> list[Row]:
        """What no model can beat: painted pictures, and the same through the autoencoder and back."""
        composer, rng = Composer(self.vocabulary, self.drawings), random.Random(5)
        painted = [composer.compose(case.scene, rng) for case in self.cases]
        return [self._row("painted", painted), self._row("painted, through the autoencoder", rebuild(painted))]

    def measure(self, setting: Setting) -> Row:
        """Draw everything that one row needs, and judge it."""
        pictures = self.painter.paint(setting, [(case.prompt, case.seed) for case in self.cases])
        return self._row(str(setting), pictures, self._diversity(setting), self._milliseconds(setting))

    def _row(self, name: str, pictures: list[Pixels], diversity: float | None = None, ms: float | None = None) -> Row:
        verdicts = [self.judge.judge(case, picture) for case, picture in zip(self.cases, pictures, strict=True)]
        if self.sheets is not None:
            save_sheet(pictures, self.sheets / f"{name}.webp")
        self.shown[name] = self._some_of_each_kind(pictures)
        looks = statistics.fmean(sharpness(picture) for picture in pictures)
        print(f"- {name}", flush=True)
        objects, near, shapes, tinted, pairs, backgrounds = shares(self.cases, verdicts)
        return Row(name, objects, near, shapes, tinted, pairs, backgrounds, looks, diversity, ms)

    def _some_of_each_kind(self, pictures: list[Pixels]) -> list[Pixels]:
        of_kinds = [
            [picture for case, picture in zip(self.cases, pictures, strict=True) if case.kind == kind] for kind in KINDS
        ]
        return [picture for of_kind in of_kinds for picture in of_kind[:SHOWN]]

    def _diversity(self, setting: Setting) -> float:
        """Of objects without a background, each with several seeds."""
        names = [case.prompt.split(" on ")[0] for case in self.cases if case.kind == "object"][:DIVERSE_PROMPTS]
        asked = [(name, seed) for name in names for seed in range(SEEDS_PER_PROMPT)]
        pictures = [picture.astype(np.int16) for picture in self.painter.paint(setting, asked)]
        groups = [pictures[start : start + SEEDS_PER_PROMPT] for start in range(0, len(pictures), SEEDS_PER_PROMPT)]
        pairs = [pair for group in groups for pair in combinations(group, 2)]
        return statistics.fmean(float(np.abs(one - other).mean()) for one, other in pairs)

    def _milliseconds(self, setting: Setting) -> float:
        times = []
        for case in self.cases[:TIMED_PICTURES]:
            start = perf_counter()
            self.painter.paint(setting, [(f"{case.prompt} ", case.seed)])  # not a prompt whose text is already encoded
            times.append(1000 * (perf_counter() - start))
        return statistics.median(times)


def shares(cases: Sequence[Case], verdicts: Sequence[Verdict]) -> list[Share]:
    """In the order of Row's columns."""
    judged = list(zip(cases, verdicts, strict=True))
    things = [share(verdict.things for case, verdict in judged if case.kind == kind) for kind in KINDS]
    near = share(verdict.near for case, verdict in judged if case.kind == "object")
    return [things[0], near, *things[1:], share(verdict.background for verdict in verdicts)]


def share(verdicts: Iterable[bool]) -> Share:
    answers = list(verdicts)
    return Share(sum(answers), len(answers))


if __name__ == "__main__":
    main()
