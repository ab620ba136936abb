"""What the bundled style LoRAs do, alone and beside the LCM-LoRA: things recognised, and how near the look comes.

    python -m benchmarks.styles neon                     # about five minutes of two cores
    python -m benchmarks.styles neon --card models/training/mini/cards/mini-neon.md

Pictures come out of the service's own engine, with prompts that the training data never showed. Things are recognised
twice: by the drawings as they are, which is right for pictures without the LoRA, and by drawings that the style's
program redrew, which is right for pictures with it. How far a picture is from a style is told by its look (mean and
spread of the three colours, and sharpness, of 255) beside a painting of the same prompt, as painted and as redrawn.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.fidelity import MARKS, TEACHER_GUIDANCE, TEACHER_SCHEDULER, TEACHER_STEPS, Share, share
from benchmarks.shared.diffusers_loop import hush_libraries
from benchmarks.shared.machine import REPOSITORY
from benchmarks.shared.painting import BASE, TEACHER, Painter, Setting, rebuild, save_sheet
from benchmarks.shared.report import print_table, write_between, write_report
from broker.messages import LoraWeight
from models.catalog import BUNDLED_PATH
from models.training.mini.dataset import IMAGE_SIZE, RGB, Composer, Pixels
from models.training.mini.judging import CaseMaker, Judge, check_reference
from models.training.mini.recognizer import MIN_CONTRAST, background_color, look_distance
from models.training.mini.reference import load_reference
from models.training.mini.restyling import STYLES, Restyle
from models.training.mini.vocabulary import load_vocabulary

SPRITE_SHARE = 0.7  # of the picture's side, as the dataset paints a single thing


@dataclass(frozen=True)
class Row:
    """The columns of the table."""

    pictures: str
    plain: Share
    restyled: Share
    background: Share
    to_plain: float
    to_style: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("style", choices=list(STYLES))
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--sheets", type=Path, help="folder for a sheet of pictures per row")
    parser.add_argument("--card", type=Path, help="text whose table to replace, such as a model card")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-styles.json")
    options = parser.parse_args()
    hush_libraries()
    rows = Bench(options.style, options.prompts, options.sheets).rows()
    table = print_table(rows)
    if options.card is not None:
        write_between(options.card, MARKS, table)
    write_report(options.json, vars(options), {"rows": rows})


def settings_of(style: str) -> list[Setting]:
    """The teacher at its best and the control wear the style, the few-step model wears it more and less."""
    full = LoraWeight(style, 1.0)
    return [
        Setting(TEACHER, TEACHER_SCHEDULER, TEACHER_STEPS, TEACHER_GUIDANCE, style=full),
        Setting(TEACHER, "lcm", 4, 0, style=full),
        Setting(BASE.name, "lcm", 4, 0),
        Setting(BASE.name, "lcm", 4, 0, style=LoraWeight(style, 0.5)),
        *(Setting(BASE.name, "lcm", steps, 0, style=full) for steps in (4, 2, 1)),
    ]


class Bench:
    """The prompts, two judges, and the painter."""

    def __init__(self, style: str, prompts: int, sheets: Path | None) -> None:
        vocabulary, reference = load_vocabulary(), load_reference(BUNDLED_PATH / "mini-sd" / "reference")
        check_reference(reference, vocabulary)
        self.style, self.sheets, self.painter = style, sheets, Painter()
        maker = CaseMaker(vocabulary, reference.drawings)
        self.cases = [case for case in maker.cases(prompts) if case.kind == "object"]
        self.plain_judge = Judge(vocabulary, reference.drawings)
        self.style_judge = restyled_judge(maker, STYLES[style])
        composer, rng = Composer(vocabulary, reference.drawings), random.Random(5)
        self.painted = [composer.compose(case.scene, rng) for case in self.cases]
        self.restyled = [STYLES[style](picture) for picture in self.painted]

    def rows(self) -> list[Row]:
        """The bounds, then every setting."""
        bounds = {
            "painted": self.painted,
            "redrawn by the program": self.restyled,
            "redrawn, through the autoencoder": rebuild(self.restyled),
        }
        asked = [(case.prompt, case.seed) for case in self.cases]
        rows = [self._row(name, pictures) for name, pictures in bounds.items()]
        return rows + [self._row(str(one), self.painter.paint(one, asked)) for one in settings_of(self.style)]

    def _row(self, name: str, pictures: Sequence[Pixels]) -> Row:
        if self.sheets is not None:
            save_sheet(pictures, self.sheets / f"{name}.webp")
        print(f"- {name}", flush=True)
        plain, restyled = (
            [judge.judge(case, picture) for case, picture in zip(self.cases, pictures, strict=True)]
            for judge in (self.plain_judge, self.style_judge)
        )
        return Row(
            name,
            share(verdict.things for verdict in plain),
            share(verdict.things for verdict in restyled),
            share(verdict.background for verdict in restyled),
            look_distance(pictures, self.painted),
            look_distance(pictures, self.restyled),
        )


def restyled_judge(maker: CaseMaker, restyle: Restyle) -> Judge:
    """A judge that knows things and backgrounds as the style shows them."""
    vocabulary = maker.vocabulary
    grounds = [vocabulary.colors[(maker.grounds((thing,)) or [0])[0]].rgb for thing in range(len(vocabulary.things))]
    drawings = [
        [restyled_sprite(sprite, ground, restyle) for sprite in kinds]
        for kinds, ground in zip(maker.drawings, grounds, strict=True)
    ]
    colors = tuple(replace(color, rgb=restyled_color(color.rgb, restyle)) for color in vocabulary.colors)
    return Judge(replace(vocabulary, colors=colors), drawings)


def restyled_sprite(sprite: Image.Image, ground: RGB, restyle: Restyle) -> Image.Image:
    """The sprite as it looks in a restyled picture; what does not stand out there is transparent."""
    side = round(SPRITE_SHARE * IMAGE_SIZE)
    small, corner = sprite.resize((side, side), Image.Resampling.LANCZOS), (IMAGE_SIZE - side) // 2
    canvas = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), ground)
    canvas.paste(small, (corner, corner), small)
    picture = restyle(np.asarray(canvas))
    stands_out = np.abs(picture - background_color(picture)).max(axis=2, keepdims=True) > MIN_CONTRAST
    return Image.fromarray(np.concatenate([picture, 255 * stands_out.astype(np.uint8)], axis=2))


def restyled_color(rgb: RGB, restyle: Restyle) -> RGB:
    """What the style makes of a plain background."""
    red, green, blue = restyle(np.full((IMAGE_SIZE, IMAGE_SIZE, 3), rgb, np.uint8))[0, 0].tolist()
    return red, green, blue


if __name__ == "__main__":
    main()
