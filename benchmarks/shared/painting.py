"""Pictures of the bundled models out of the service's own engine, by any setting: what fidelity is measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw, ImageFont

from broker.messages import Delivery, LoraWeight
from models.catalog import BUNDLED_PATH, ModelSpec, SchedulerSpec, get_spec, load_catalog
from models.loading import load_pipeline
from models.training.mini.dataset import Pixels
from models.training.mini.pixels import to_pixels, to_tensor
from workers.engine import Engine, Finished, GenerationFailed
from workers.engine.engine import run_until_done
from workers.engine.jobs import make_job
from workers.engine.runner import ModelRunner

BASE = get_spec(load_catalog(), "mini-lcm")
TEACHER, TEACHER_XL = "mini-sd", "mini-sdxl"
FAMILIES = {TEACHER: "sd", TEACHER_XL: "sdxl"}
FURTHER_SCHEDULERS = {
    "tcd, eta 0": SchedulerSpec(class_name="TCDScheduler", config={"original_inference_steps": 20}),
    "unipc": SchedulerSpec(class_name="UniPCMultistepScheduler", config={"timestep_spacing": "trailing"}),
}
SCHEDULERS = (*BASE.schedulers, *FURTHER_SCHEDULERS)
BATCH = 32
LABEL_WIDTH, GAP = 150, 4  # of a gallery, in pixels


@dataclass(frozen=True)
class Setting:
    """One way to draw. `model` is an entry of the catalog or a bundled teacher; `style` a style LoRA's choice."""

    model: str
    scheduler: str
    steps: int
    guidance: float
    decoder: str = "full"
    style: LoraWeight | None = None

    def __str__(self) -> str:
        parts = [
            self.model,
            self.scheduler,
            f"{self.steps} step{'s' * (self.steps > 1)}",
            f"guidance {self.guidance:g}",
        ]
        parts += [f"{self.decoder} decoder"] if self.decoder != "full" else []
        parts += [f"{self.style.name} {self.style.weight:g}"] if self.style else []
        return ", ".join(parts)


class Painter:
    """Draws with any setting, also of the entries of a catalog file `extra`; each model is loaded once, in float32."""

    def __init__(self, extra: Path | None = None) -> None:
        self._extra = extra
        self._specs: dict[str, ModelSpec] = {}  # a catalog takes as long to read as a step to compute
        self._engines: dict[str, Engine] = {}

    def paint(self, setting: Setting, asked: Sequence[tuple[str, int]]) -> list[Pixels]:
        """A picture for each prompt and seed, in their order, drawn together as far as the engine's batches reach.
        Raises RuntimeError where one wasn't drawn."""
        spec, engine = self._spec(setting.model), self._engine(setting.model)
        wishes = {
            "num_inference_steps": setting.steps,
            "guidance_scale": setting.guidance,
            "scheduler": setting.scheduler,
            "decoder": setting.decoder,
            "loras": (setting.style,) if setting.style else (),
        }
        for index, (prompt, seed) in enumerate(asked):
            job = make_job(spec, str(index), prompt, seed=seed, **wishes)
            engine.add(Delivery(job, attempt=1, waited_ms=0))
        outputs = list(run_until_done(engine))
        finished = [output for output in outputs if isinstance(output, Finished)]
        if len(finished) < len(asked):
            failed = next((output for output in outputs if isinstance(output, GenerationFailed)), None)
            raise RuntimeError(f"{setting}: {len(finished)} of {len(asked)} pictures were drawn; {failed}")
        finished.sort(key=lambda output: int(output.request.request_id))
        return [output.pixels[0] for output in finished]

    def _spec(self, model: str) -> ModelSpec:
        if model not in self._specs:
            self._specs[model] = spec_of(model, self._extra)
        return self._specs[model]

    def _engine(self, model: str) -> Engine:
        if model not in self._engines:
            pipeline = load_pipeline(self._spec(model), torch.device("cpu"), torch.float32)
            self._engines[model] = Engine({pipeline.spec.name: ModelRunner(pipeline)})
        return self._engines[model]


def spec_of(model: str, extra: Path | None = None) -> ModelSpec:
    """An entry, also of the catalog file `extra`, or a bundled teacher as one; with every scheduler that is compared.
    Raises CatalogError."""
    if family := FAMILIES.get(model):
        spec = BASE.model_copy(update={"family": family, "source": f"bundled:{model}", "lora": None})
    else:
        spec = get_spec(load_catalog(extra=extra), model)
    return spec.model_copy(update={"schedulers": spec.schedulers | FURTHER_SCHEDULERS})


@torch.no_grad()
def rebuild(pictures: Sequence[Pixels]) -> list[Pixels]:
    """Through the autoencoder of the base model and back."""
    vae = AutoencoderKL.from_pretrained(BUNDLED_PATH / "mini-sd", subfolder="vae", variant="fp16", dtype=torch.float32)
    batches = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
    return [picture for batch in batches for picture in to_pixels(vae(to_tensor(batch), sample_posterior=False).sample)]


def save_sheet(pictures: Sequence[Pixels], path: Path, columns: int = 20, number: int = 200) -> None:
    """At most `number` of the pictures, spread evenly over all."""
    shown = pictures[:: max(1, len(pictures) // number)][:number]
    side = shown[0].shape[0]
    page = Image.new("RGB", (columns * side, -(-len(shown) // columns) * side))
    for index, picture in enumerate(shown):
        page.paste(Image.fromarray(picture), (index % columns * side, index // columns * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, quality=85, method=6)


def save_gallery(lines: Mapping[str, Sequence[Pixels]], path: Path) -> None:
    """A line of pictures for each name, of the same prompts."""
    shown = {name: np.concatenate(pictures, axis=1) for name, pictures in lines.items()}
    height, width, _ = next(iter(shown.values())).shape
    page = Image.new("RGB", (LABEL_WIDTH + width, len(shown) * (height + GAP) - GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=10)
    for number, (name, strip) in enumerate(shown.items()):
        top = number * (height + GAP)
        pen.multiline_text((2, top + 2), name.replace(", ", "\n"), "black", font, spacing=1)
        page.paste(Image.fromarray(strip), (LABEL_WIDTH, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, quality=60, method=6)
