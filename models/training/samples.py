"""Sheets of samples: what the student draws while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from models.training.teachers import Conditions, Encoders, Size, Teacher
from models.training.trainer import Compute

STEPS = (1, 2, 4)
HEAD = 16  # pixels above the pictures, for the number of steps


class SampleSheet:
    """Draws the same prompts from the same noise, by diffusers' own pipeline: a row per prompt, a column per number of
    steps. The prompts are encoded at once, so that the text encoders can leave memory."""

    def __init__(
        self, prompts: Sequence[str], encoders: Encoders, size: Size, scheduler: Any, guidance_scale: float
    ) -> None:
        self.prompts, self.size = prompts, size
        self._teacher: Teacher = encoders.teacher
        self._conditions: Conditions = encoders.encode_captions(prompts)
        self._scheduler, self._guidance_scale = scheduler, guidance_scale
        most = scheduler.config.get("original_inference_steps", max(STEPS))  # an LCM learns no further ones
        self._steps = [steps for steps in STEPS if steps <= most]

    def save(self, unet: Any, compute: Compute, path: Path) -> None:
        """Write the sheet of the network as it is now."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.draw(unet, compute).save(path)

    def draw(self, unet: Any, compute: Compute) -> Image.Image:
        pipe = self._build_pipeline(unet, compute.device)
        with compute.autocast():
            columns = [self._draw_column(pipe, steps, compute.device) for steps in self._steps]
        return self._compose(columns)

    def _build_pipeline(self, unet: Any, device: torch.device) -> Any:
        """Without text encoders. The VAE is in memory for as long as the sheet takes."""
        absent = dict.fromkeys((*self._teacher.text_encoders, *self._teacher.tokenizers))
        vae = self._teacher.load("vae", device, torch.float32)
        arguments = self._teacher.pipeline_arguments
        pipe = self._teacher.pipeline_class(unet=unet, vae=vae, scheduler=self._scheduler, **absent, **arguments)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _draw_column(self, pipe: Any, steps: int, device: torch.device) -> list[Image.Image]:
        width, height = self.size
        conditions = self._conditions.to(device)
        pooled = {} if conditions.pooled is None else {"pooled_prompt_embeds": conditions.pooled}
        images: list[Image.Image] = pipe(
            prompt_embeds=conditions.states,
            **pooled,
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=self._guidance_scale,
            generator=[torch.Generator().manual_seed(number) for number in range(len(self.prompts))],
        ).images
        return images

    def _compose(self, columns: Sequence[Sequence[Image.Image]]) -> Image.Image:
        width, height = self.size
        sheet = Image.new("RGB", (width * len(columns), HEAD + height * len(self.prompts)), "white")
        for column, (steps, images) in enumerate(zip(self._steps, columns, strict=True)):
            ImageDraw.Draw(sheet).text((column * width + 2, 2), f"{steps} step{'s' if steps > 1 else ''}", "black")
            for row, image in enumerate(images):
                sheet.paste(image, (column * width, HEAD + row * height))
        return sheet
