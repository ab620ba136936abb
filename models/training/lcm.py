"""Stage 3: LCM-LoRA. Latent consistency distillation (Luo et al., arXiv 2310.04378) into a LoRA (Luo et al.,
arXiv 2311.05556).

The student's prediction at a noisy timestep is drawn to the averaged student's at a less noisy one. One DDIM step of
the teacher, with classifier-free guidance, leads from one to the other; it skips `1000 / solver_timesteps` training
timesteps. Boundary scalings are those of diffusers' `LCMScheduler`, the loss is pseudo-Huber.

    python -m models.training.lcm --latents runs/latents --teacher runs/teacher --out runs/lcm
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from models.training.diffusion import NUM_TIMESTEPS, Diffusion
from models.training.mini.latents import LatentCache
from models.training.mini.teacher import CAPTION_DROPOUT, CaptionedLatents
from models.training.mini.vocabulary import load_vocabulary
from models.training.trainer import Trainer, TrainSettings, autocast

LORA_RANK = 12
LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


@dataclass(frozen=True)
class LcmSettings:
    """What defines the distillation; sampling must use the same number of solver timesteps."""

    solver_timesteps: int = 20
    guidance_scale: float = 2.0
    huber: float = 1e-3
    sigma_data: float = 0.5
    timestep_scaling: float = 10.0

    @property
    def skip(self) -> int:
        return NUM_TIMESTEPS // self.solver_timesteps


class Consistency:
    """The consistency function f(x, t) = c_skip(t) x + c_out(t) x0(x, t), and the teacher's DDIM step."""

    def __init__(self, settings: LcmSettings, diffusion: Diffusion) -> None:
        self.settings = settings
        self.diffusion = diffusion

    def draw_timesteps(self, count: int) -> tuple[Tensor, Tensor]:
        """Random neighbours on the solver's grid: where the student starts, and where the teacher's step ends."""
        index = torch.randint(1, self.settings.solver_timesteps + 1, (count,))
        start = index * self.settings.skip - 1
        return start, (start - self.settings.skip).clamp(min=0)

    def apply(self, unet: UNet2DConditionModel, noisy: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        """f(x, t), `"b 4 h w"`."""
        clean, _ = self.predict(unet, noisy, timesteps, states)
        c_skip, c_out = self.boundary(timesteps)
        return c_skip * noisy + c_out * clean

    def predict(
        self, unet: UNet2DConditionModel, noisy: Tensor, timesteps: Tensor, states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x0 and noise as the network sees them."""
        with autocast():
            velocity = unet(noisy, timesteps, states).sample
        return self.diffusion.split(noisy, velocity.float(), timesteps)

    def boundary(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out, `"b 1 1 1"`: at timestep 0 the function is the identity."""
        scaled = timesteps[:, None, None, None] * self.settings.timestep_scaling
        total = scaled**2 + self.settings.sigma_data**2
        return self.settings.sigma_data**2 / total, scaled / total**0.5

    @torch.no_grad()
    def solve(
        self, teacher: UNet2DConditionModel, noisy: Tensor, start: Tensor, end: Tensor, states: Tensor, empty: Tensor
    ) -> Tensor:
        """One DDIM step of the guided teacher from `start` to `end`."""
        both = torch.cat([states, empty.expand_as(states)])
        clean, noise = self.predict(teacher, noisy.repeat(2, 1, 1, 1), start.repeat(2), both)
        signal, spread = self.diffusion.shares(end)
        return signal * self._guided(clean) + spread * self._guided(noise)

    def _guided(self, both: Tensor) -> Tensor:
        conditional, unconditional = both.chunk(2)
        return unconditional + self.settings.guidance_scale * (conditional - unconditional)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Pseudo-Huber distance."""
        huber = self.settings.huber
        return (((output - target) ** 2 + huber**2).sqrt() - huber).mean()


class Distiller:
    """Frozen teacher, student with LoRA, and averaged student as the target."""

    def __init__(
        self,
        teacher: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        data: CaptionedLatents,
        out: Path,
        train: TrainSettings,
        settings: LcmSettings,
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.data = data
        self.out = out
        self.consistency = Consistency(settings, Diffusion())
        torch.manual_seed(train.seed)
        self.student = with_lora(self.teacher)
        self.trainer = Trainer(self.student, out, train)
        self.empty = self._states(data.tokens([""]))

    def distill(self) -> None:
        """Train to the end of the plan; the averaged LoRA lies in `out` after every checkpoint."""
        self.trainer.fit(self.loss, on_save=lambda: save_lora(self.trainer.averaged, self.out))

    def loss(self, _step: int) -> Tensor:
        latents, tokens = self.data.batch(self.trainer, CAPTION_DROPOUT)
        states = self._states(tokens)
        start, end = self.consistency.draw_timesteps(len(latents))
        noisy = self.consistency.diffusion.add_noise(latents, torch.randn_like(latents), start)
        output = self.consistency.apply(self.student, noisy, start, states)
        return self.consistency.loss(output, self._target(noisy, start, end, states))

    @torch.no_grad()
    def _target(self, noisy: Tensor, start: Tensor, end: Tensor, states: Tensor) -> Tensor:
        solved = self.consistency.solve(self.teacher, noisy, start, end, states, self.empty)
        return self.consistency.apply(self.trainer.averaged, solved, end, states)

    @torch.no_grad()
    def _states(self, tokens: Tensor) -> Tensor:
        with autocast():
            states: Tensor = self.text_encoder(tokens).last_hidden_state
        return states.float()


def with_lora(
    unet: UNet2DConditionModel, rank: int = LORA_RANK, targets: Sequence[str] = LORA_TARGETS
) -> UNet2DConditionModel:
    """A copy that trains a LoRA only. Its strength `alpha` equals the rank, diffusers' default on loading."""
    student = copy.deepcopy(unet).train()
    student.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)))
    return student


def save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the LoRA as diffusers' `load_lora_weights` reads it."""
    layers = {name: weight.contiguous() for name, weight in get_peft_model_state_dict(unet).items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def main(
    latents: Annotated[Path, typer.Option(help="Folder that the latents stage wrote.")],
    teacher: Annotated[Path, typer.Option(help="Folder that the teacher stage wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, logs and results.")],
    steps: int = 600,
    rate: float = 4e-4,
    batch_size: int = 48,
    guidance_scale: Annotated[float, typer.Option(help="Guidance of the teacher that the student learns.")] = 2.0,
    solver_timesteps: Annotated[int, typer.Option(help="DDIM timesteps; sampling must use the same number.")] = 20,
    ema_decay: Annotated[float, typer.Option(help="Decay of the averaged student, which is the target.")] = 0.95,
    emoji: Annotated[bool, typer.Option(help="As the teacher was trained.")] = True,
    seed: int = 2,
) -> None:
    """Distil the teacher into an LCM-LoRA; continues where an interrupted run stopped."""
    vocabulary = load_vocabulary() if emoji else load_vocabulary().without_emoji()
    tokenizer = CLIPTokenizer.from_pretrained(teacher / "tokenizer")
    data = CaptionedLatents(LatentCache.load(latents), vocabulary, tokenizer, batch_size)
    Distiller(
        UNet2DConditionModel.from_pretrained(teacher / "unet"),
        CLIPTextModel.from_pretrained(teacher / "text_encoder"),
        data,
        out,
        TrainSettings(steps, rate, warmup=30, ema_decay=ema_decay, save_every=250, weight_decay=0, seed=seed),
        LcmSettings(solver_timesteps=solver_timesteps, guidance_scale=guidance_scale),
    ).distill()


if __name__ == "__main__":
    typer.run(main)
