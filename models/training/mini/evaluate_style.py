"""Evaluation of a style LoRA: is it the style, and is the asked-for thing still there? Every emoji once.

Things are recognised twice: by the sprites as they are, which is right for pictures without the LoRA, and by sprites
that the style's program redrew, which is right for pictures with it. How far a picture is from a style is told by its
look beside a painting of the same prompt, plain and restyled.

    python -m models.training.mini.evaluate_style neon --out runs/figures/neon
"""

from __future__ import annotations

import random
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from PIL import Image

from models.training.mini.dataset import IMAGE_SIZE, RGB, Composer, Pixels
from models.training.mini.evaluate import (
    Bench,
    Case,
    Judge,
    build_cases,
    contrasting_colors,
    draw,
    sheet,
    write_into_card,
)
from models.training.mini.export import BUNDLED
from models.training.mini.recognizer import MIN_CONTRAST, background_color, sharpness
from models.training.mini.restyling import STYLES, Restyle
from models.training.mini.style import StyleName
from models.training.mini.vocabulary import Vocabulary, load_vocabulary

SPRITE_SHARE = 0.75  # of the picture's side, as the dataset paints a single thing
HEAD = [
    "| pictures | thing, plain | thing, restyled | background, restyled | to plain | to style |",
    "| --- | --- | --- | --- | --- | --- |",
]


def look(picture: Pixels) -> npt.NDArray[np.float64]:
    """Mean and spread of each colour channel and the sharpness, all in 0 to 255: `"7"`."""
    return np.array([*picture.mean(axis=(0, 1)), *picture.std(axis=(0, 1)), sharpness(picture)])


def look_distance(pictures: Sequence[Pixels], others: Sequence[Pixels]) -> float:
    """Root of the mean squared difference between the looks of pictures and their counterparts."""
    differences = [look(picture) - look(other) for picture, other in zip(pictures, others, strict=True)]
    return float(np.sqrt(np.square(differences).mean()))


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


def restyled_judge(vocabulary: Vocabulary, composer: Composer, restyle: Restyle) -> Judge:
    """A judge that knows things and backgrounds as the style shows them."""
    grounds = [contrasting_colors((thing,), vocabulary, composer)[0] for thing in range(len(vocabulary.things))]
    sprites = [
        restyled_sprite(sprite, vocabulary.colors[ground].rgb, restyle)
        for sprite, ground in zip(composer.sprites, grounds, strict=True)
    ]
    colors = tuple(replace(color, rgb=restyled_color(color.rgb, restyle)) for color in vocabulary.colors)
    return Judge(replace(vocabulary, colors=colors), sprites)


class StyleBench(Bench):
    """The pipeline under test, wearing a style or none."""

    def __init__(self, bundled: Path, style: str) -> None:
        super().__init__(bundled)
        self.style = style
        self.style_lora = bundled / f"mini-{style}"

    def wear(self, weight: float) -> None:
        """Put the style on, or off with weight 0; what is fused stays."""
        self.pipeline.unload_lora_weights()
        if weight:
            self.pipeline.load_lora_weights(self.style_lora, adapter_name=self.style)
            self.pipeline.set_adapters(self.style, weight)


def share_right(judge: Judge, cases: Sequence[Case], pictures: Sequence[Pixels]) -> float:
    """Share of pictures with the thing that was asked for."""
    return statistics.fmean(
        judge.has_things(case.scene, picture) for case, picture in zip(cases, pictures, strict=True)
    )


def share_named(judge: Judge, cases: Sequence[Case], pictures: Sequence[Pixels]) -> float:
    """Share of pictures on the background that was asked for."""
    names = [judge.namer.name(picture) for picture in pictures]
    return statistics.fmean(case.scene.background == name for case, name in zip(cases, names, strict=True))


class Table:
    """Scores rows of pictures; sheets go to `out`."""

    def __init__(
        self, cases: Sequence[Case], vocabulary: Vocabulary, composer: Composer, style: str, out: Path
    ) -> None:
        restyle, rng = STYLES[style], random.Random(5)
        self.cases = cases
        self.painted = [composer.compose(case.scene, rng) for case in cases]
        self.restyled = [restyle(picture) for picture in self.painted]
        self.plain_judge = Judge(vocabulary, composer.sprites)
        self.style_judge = restyled_judge(vocabulary, composer, restyle)
        self.out = out
        self.lines = list(HEAD)

    def add(self, name: str, pictures: Sequence[Pixels]) -> None:
        judges, judged = (self.plain_judge, self.style_judge), (self.cases, pictures)
        shares = [*(share_right(judge, *judged) for judge in judges), share_named(self.style_judge, *judged)]
        distances = [look_distance(pictures, goal) for goal in (self.painted, self.restyled)]
        cells = [name, *(f"{share:.1%}" for share in shares), *(f"{distance:.1f}" for distance in distances)]
        self.lines.append(f"| {' | '.join(cells)} |")
        print(self.lines[-1], flush=True)
        sheet(pictures).save(self.out / f"{len(self.lines) - len(HEAD):02d}.png")


def evaluate(style: str, bundled: Path, out: Path) -> list[str]:
    """Draw and score every row. Returns the table's lines."""
    vocabulary = load_vocabulary()
    composer = Composer(vocabulary)
    cases = build_cases(vocabulary, composer)[: len(vocabulary.emoji)]
    table, bench = Table(cases, vocabulary, composer, style, out), StyleBench(bundled, style)

    def sample(name: str, weight: float, *, lcm: bool, steps: int, guidance_scale: float) -> None:
        bench.wear(weight)
        table.add(name, draw(bench.sampler(lcm, steps, guidance_scale), cases, name))

    table.add("painted", table.painted)
    table.add("redrawn by the program (ceiling)", table.restyled)
    table.add("redrawn, after the autoencoder", bench.rebuild(table.restyled))
    sample("teacher and style 1, DDIM, 20 steps, guidance 1.5", 1, lcm=False, steps=20, guidance_scale=1.5)
    sample("control: style 1 without the LCM-LoRA, LCM, 4 steps", 1, lcm=True, steps=4, guidance_scale=0)
    bench.wear(0)
    bench.fuse()
    for weight in (0, 0.5, 1):
        sample(f"LCM-LoRA and style {weight}, 4 steps", weight, lcm=True, steps=4, guidance_scale=0)
    for steps in (1, 2):
        sample(f"LCM-LoRA and style 1, {steps} step(s)", 1, lcm=True, steps=steps, guidance_scale=0)
    return table.lines


def main(
    style: Annotated[StyleName, typer.Argument(help="A style of models/training/mini/restyling.py.")],
    out: Annotated[Path, typer.Option(help="Folder for the table and the sample sheets.")],
    bundled: Annotated[Path, typer.Option(help="Folder with the model folders.")] = BUNDLED,
    card: Annotated[Path | None, typer.Option(help="Model card whose table to replace, here and as shipped.")] = None,
) -> None:
    """Score a shipped style LoRA."""
    out.mkdir(parents=True, exist_ok=True)
    lines = evaluate(style, bundled, out)
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if card is not None:
        write_into_card(card, lines)
        shutil.copyfile(card, bundled / f"mini-{style}" / "README.md")


if __name__ == "__main__":
    typer.run(main)
