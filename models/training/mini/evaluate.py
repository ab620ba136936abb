"""Evaluation: are the asked-for things and backgrounds in the pictures? Through diffusers' own pipeline.

Every row draws the same prompts with the same seeds. Two rows bound the measure (painted pictures, and those after
the autoencoder), and the controls sample like the few-step model but without its distillation.

    python -m models.training.mini.evaluate --out runs/evaluation
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderTiny, LCMScheduler, StableDiffusionPipeline
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from models.training.mini.captions import plain_caption
from models.training.mini.dataset import Composer, Layout, Pixels, Scene
from models.training.mini.pixels import to_pixels, to_tensor
from models.training.mini.recognizer import MIN_CONTRAST, ColorNamer, Recognizer, background_noise, sharpness
from models.training.mini.vocabulary import Vocabulary, load_vocabulary

BUNDLED = Path(__file__).parents[2] / "bundled"
CARD_MARKS = ("<!-- evaluation: start -->", "<!-- evaluation: end -->")
NUM_SHAPES = 48
NUM_PAIRS = 96
BATCH_SIZE = 32

Generate = Callable[[list[str], list[int]], list[Pixels]]


@dataclass(frozen=True)
class Case:
    """One prompt, what it asks for, and its seed."""

    prompt: str
    scene: Scene
    seed: int


@dataclass(frozen=True)
class Score:
    """Shares of right pictures, and two measures of their looks in 0 to 255."""

    emoji: float
    shapes: float
    both: float
    background: float
    noise: float
    sharpness: float


def build_cases(vocabulary: Vocabulary, composer: Composer, seed: int = 11) -> list[Case]:
    """Every emoji once, some shapes, some pairs (half of them above each other), each on a contrasting background."""
    rng = random.Random(seed)
    everything = [*vocabulary.emoji, *vocabulary.shapes]
    groups: list[tuple[int, ...]] = [(thing,) for thing in vocabulary.emoji]
    groups += [(thing,) for thing in rng.sample(vocabulary.shapes, min(NUM_SHAPES, len(vocabulary.shapes)))]
    groups += [(rng.choice(everything), rng.choice(everything)) for _ in range(NUM_PAIRS)]
    return [_case(things, number, vocabulary, composer, rng) for number, things in enumerate(groups)]


def _case(things: tuple[int, ...], number: int, vocabulary: Vocabulary, composer: Composer, rng: random.Random) -> Case:
    background = rng.choice(contrasting_colors(things, vocabulary, composer))
    layout: Layout = "single" if len(things) == 1 else "row" if number % 2 else "column"
    scene = Scene(things, layout, "normal", background)
    return Case(plain_caption(scene, vocabulary), scene, 1000 + number)


def contrasting_colors(things: Sequence[int], vocabulary: Vocabulary, composer: Composer) -> list[int]:
    """The colours from which at least 85 % of every thing's pixels stand out (or the best one)."""
    shares = [min(_contrast(composer.sprites[thing], color.rgb) for thing in things) for color in vocabulary.colors]
    return [index for index, share in enumerate(shares) if share >= min(0.85, max(shares))]


def _contrast(sprite: Image.Image, rgb: tuple[int, int, int]) -> float:
    pixels = np.asarray(sprite.resize((32, 32)), dtype=np.float32)
    visible = pixels[pixels[..., 3] > 128][:, :3]
    return float((np.abs(visible - np.asarray(rgb)).max(axis=1) > MIN_CONTRAST).mean())


class Judge:
    """Scores pictures against what their prompts asked for."""

    def __init__(self, vocabulary: Vocabulary, sprites: Sequence[Image.Image]) -> None:
        self.vocabulary = vocabulary
        self.recognizer = Recognizer(sprites)
        self.namer = ColorNamer([color.rgb for color in vocabulary.colors])

    def score(self, cases: Sequence[Case], pictures: Sequence[Pixels]) -> Score:
        rows = list(zip(cases, pictures, strict=True))
        singles = [row for row in rows if row[0].scene.layout == "single"]
        emoji = [row for row in singles if self.vocabulary.things[row[0].scene.things[0]].glyph]
        return Score(
            emoji=self._share(emoji),
            shapes=self._share([row for row in singles if row not in emoji]),
            both=self._share([row for row in rows if row[0].scene.layout != "single"]),
            background=statistics.fmean(self.namer.name(picture) == case.scene.background for case, picture in rows),
            noise=statistics.fmean(background_noise(picture) for picture in pictures),
            sharpness=statistics.fmean(sharpness(picture) for picture in pictures),
        )

    def has_things(self, scene: Scene, picture: Pixels) -> bool:
        """Whether all asked-for things are there, each in its place."""
        if scene.layout == "single":
            return self.recognizer.single(picture) == scene.things[0]
        return self.recognizer.pair(picture, vertical=scene.layout == "column") == scene.things

    def _share(self, rows: Sequence[tuple[Case, Pixels]]) -> float:
        return statistics.fmean(self.has_things(case.scene, picture) for case, picture in rows)


class Bench:
    """The pipeline under test, with and without its LoRA."""

    def __init__(self, bundled: Path) -> None:
        self.pipeline = StableDiffusionPipeline.from_pretrained(
            bundled / "mini-sd", variant="fp16", dtype=torch.float32
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.lora = bundled / "mini-lcm-lora"
        self.full = self.pipeline.vae
        self.tiny = AutoencoderTiny.from_pretrained(bundled / "mini-taesd", variant="fp16", dtype=torch.float32)
        self.ddim = self.pipeline.scheduler
        self.lcm = LCMScheduler.from_pretrained(self.lora)

    def fuse(self) -> None:
        """Load, fuse and unload the LoRA, as a worker does."""
        self.pipeline.load_lora_weights(self.lora)
        self.pipeline.fuse_lora()
        self.pipeline.unload_lora_weights()

    def sampler(self, lcm: bool, steps: int, guidance_scale: float, tiny: bool = False) -> Generate:
        """A function from prompts and seeds to pictures."""

        def generate(prompts: list[str], seeds: list[int]) -> list[Pixels]:
            self.pipeline.scheduler = self.lcm if lcm else self.ddim
            self.pipeline.register_modules(vae=self.tiny if tiny else self.full)
            output = self.pipeline(
                prompts,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pil",
            )
            return [np.asarray(image) for image in output.images]

        return generate

    @torch.no_grad()
    def rebuild(self, pictures: Sequence[Pixels]) -> list[Pixels]:
        """Pictures after a round trip through the autoencoder."""
        latents = self.full.encode(to_tensor(pictures)).latent_dist.mean
        return list(to_pixels(self.full.decode(latents).sample))


def draw(generate: Generate, cases: Sequence[Case], name: str) -> list[Pixels]:
    """All pictures of one row, batch by batch."""
    pictures: list[Pixels] = []
    for start in tqdm(range(0, len(cases), BATCH_SIZE), desc=name, leave=False):
        batch = cases[start : start + BATCH_SIZE]
        pictures += generate([case.prompt for case in batch], [case.seed for case in batch])
    return pictures


def latency_ms(generate: Generate, repeats: int = 30) -> float:
    """Median time of one picture at batch 1, after a warm-up."""
    times = []
    for seed in range(repeats + 3):
        start = time.perf_counter()
        generate(["a red apple on a blue background"], [seed])
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def sheet(pictures: Sequence[Pixels], columns: int = 20) -> Image.Image:
    """Pictures side by side."""
    height, width, _ = pictures[0].shape
    page = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for index, picture in enumerate(pictures):
        page.paste(Image.fromarray(picture), (index % columns * width, index // columns * height))
    return page


def table_row(name: str, score: Score, latency: float | None) -> str:
    time_text = f"{latency:.0f} ms" if latency else ""
    shares = " | ".join(f"{value:.1%}" for value in (score.emoji, score.shapes, score.both, score.background))
    return f"| {name} | {shares} | {score.noise:.2f} | {score.sharpness:.2f} | {time_text} |"


def table_head(cases: Sequence[Case]) -> list[str]:
    pairs = sum(case.scene.layout != "single" for case in cases)
    return [
        f"{len(cases)} prompts, {pairs} of them for two things; one seed each.",
        "",
        "| pictures | emoji | shapes | both of two | background | mottling | sharpness | batch 1, P50 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]


def evaluate(bundled: Path, out: Path) -> list[str]:
    """Draw and score every row; sheets go to `out`. Returns the table's lines."""
    vocabulary = load_vocabulary()
    composer = Composer(vocabulary)
    cases = build_cases(vocabulary, composer)
    judge, bench, lines = Judge(vocabulary, composer.sprites), Bench(bundled), table_head(cases)

    def add(name: str, pictures: list[Pixels], generate: Generate | None = None) -> None:
        lines.append(table_row(name, judge.score(cases, pictures), latency_ms(generate) if generate else None))
        print(lines[-1], flush=True)
        sheet(pictures).save(out / f"{len(lines) - 4:02d}.png")

    def sample(name: str, **settings: float) -> None:
        generate = bench.sampler(**settings)  # type: ignore[arg-type]
        add(name, draw(generate, cases, name), generate)

    rng = random.Random(5)
    painted = [composer.compose(case.scene, rng) for case in cases]
    add("painted (ceiling)", painted)
    add("painted, after the autoencoder", bench.rebuild(painted))
    sample("teacher, DDIM, 20 steps, guidance 1.5", lcm=False, steps=20, guidance_scale=1.5)
    for steps in (4, 1):
        sample(f"control: no LoRA, DDIM, {steps} step(s), guidance 1.5", lcm=False, steps=steps, guidance_scale=1.5)
        sample(f"control: no LoRA, LCM, {steps} step(s)", lcm=True, steps=steps, guidance_scale=0)
    bench.fuse()
    for steps in (1, 2, 4, 8):
        sample(f"LCM-LoRA, {steps} step(s)", lcm=True, steps=steps, guidance_scale=0)
    sample("LCM-LoRA, 4 steps, tiny decoder", lcm=True, steps=4, guidance_scale=0, tiny=True)
    return lines


def write_into_card(card: Path, lines: Sequence[str]) -> None:
    """Replace what stands between the marks of a model card."""
    before, _, rest = card.read_text(encoding="utf-8").partition(CARD_MARKS[0])
    _, _, after = rest.partition(CARD_MARKS[1])
    card.write_text("\n".join([before + CARD_MARKS[0], *lines, CARD_MARKS[1] + after]), encoding="utf-8")


def main(
    out: Annotated[Path, typer.Option(help="Folder for the table and the sample sheets.")],
    bundled: Annotated[Path, typer.Option(help="Folder with the three model folders.")] = BUNDLED,
    card: Annotated[Path | None, typer.Option(help="Model card whose table to replace.")] = None,
) -> None:
    """Score the shipped weights."""
    out.mkdir(parents=True, exist_ok=True)
    lines = evaluate(bundled, out)
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if card is not None:
        write_into_card(card, lines)


if __name__ == "__main__":
    typer.run(main)
