"""Latent consistency distillation (Luo et al., arXiv 2310.04378, algorithm 1), into a LoRA (Luo et al., arXiv
2311.05556) or into a whole network that reads the guidance scale (section 4.2 of the former).

The student's prediction at a noisy timestep is drawn to the averaged student's at a less noisy one. One DDIM step of
the teacher, with classifier-free guidance, leads from one to the other; it skips `1000 / solver_timesteps` training
timesteps (section 4.3). Boundary scalings are those of diffusers' `LCMScheduler`, the loss is pseudo-Huber.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from models.networks import check_weights
from models.training.diffusion import Diffusion
from models.training.errors import StartError
from models.training.pictures import Batches
from models.training.teachers import Conditions, call_unet
from models.training.trainer import Compute, Identity, Trainer, TrainSettings

RUN = "training"  # folder of what a run needs to go on, beside its result
LORA_RANK = 12  # the miniature's
LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
GUIDANCE_WIDTH = 256  # time_cond_proj_dim of the published full LCMs


@dataclass(frozen=True)
class LcmSettings:
    """What defines the distillation; sampling must use the same number of solver timesteps. The guidance scale of each
    picture is drawn between the two that are given."""

    solver_timesteps: int = 50
    min_guidance: float = 3.0
    max_guidance: float = 15.0
    huber: float = 1e-3
    sigma_data: float = 0.5
    timestep_scaling: float = 10.0


class Consistency:
    """The consistency function f(x, t) = c_skip(t) x + c_out(t) x0(x, t), and the teacher's DDIM step."""

    def __init__(self, settings: LcmSettings, diffusion: Diffusion, compute: Compute | None = None) -> None:
        self.settings = settings
        self.diffusion = diffusion
        self.compute = compute or Compute()
        self.skip = diffusion.num_timesteps // settings.solver_timesteps

    def draw_timesteps(self, count: int) -> tuple[Tensor, Tensor]:
        """Random neighbours on the solver's grid, `"b"` each: where the student starts, and where the teacher's step
        ends."""
        index = torch.randint(1, self.settings.solver_timesteps + 1, (count,)).to(self.compute.device)
        start = index * self.skip - 1
        return start, (start - self.skip).clamp(min=0)

    def draw_guidance(self, count: int) -> Tensor:
        """Guidance scales `"b"`, 1 + w in the paper's words."""
        low, high = self.settings.min_guidance, self.settings.max_guidance
        return (low + (high - low) * torch.rand(count)).to(self.compute.device)

    def apply(
        self, unet: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions, embedded: Tensor | None = None
    ) -> Tensor:
        """f(x, t), `"b 4 h w"`."""
        clean, _ = self.predict(unet, noisy, timesteps, conditions, embedded)
        c_skip, c_out = self.boundary(timesteps)
        return c_skip * noisy + c_out * clean

    def predict(
        self, unet: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions, embedded: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x0 and noise as the network sees them."""
        with self.compute.autocast():
            output = call_unet(unet, noisy, timesteps, conditions, embedded)
        return self.diffusion.split(noisy, output, timesteps)

    def boundary(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out, `"b 1 1 1"`: at timestep 0 the function is the identity."""
        scaled = timesteps[:, None, None, None] * self.settings.timestep_scaling
        total = scaled**2 + self.settings.sigma_data**2
        return self.settings.sigma_data**2 / total, scaled / total**0.5

    @torch.no_grad()
    def solve(
        self,
        teacher: Any,
        noisy: Tensor,
        start: Tensor,
        end: Tensor,
        conditions: Conditions,
        unconditional: Conditions,
        guidance_scales: Tensor,
    ) -> Tensor:
        """One DDIM step (Song et al., arXiv 2010.02502, eq. 12) of the guided teacher from `start` to `end`."""
        both = Conditions.stack([conditions, unconditional.spread_over(conditions)])
        clean, noise = self.predict(teacher, noisy.repeat(2, 1, 1, 1), start.repeat(2), both)
        signal, spread = self.diffusion.shares(end)
        return signal * guided(clean, guidance_scales) + spread * guided(noise, guidance_scales)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Pseudo-Huber distance."""
        huber = self.settings.huber
        return (((output - target) ** 2 + huber**2).sqrt() - huber).mean()


def guided(both: Tensor, guidance_scales: Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) of conditional rows, then unconditional ones."""
    conditional, unconditional = both.chunk(2)
    return unconditional + guidance_scales[:, None, None, None] * (conditional - unconditional)


def embed_guidance(guidance_scales: Tensor, width: int = GUIDANCE_WIDTH) -> Tensor:
    """`"b width"`: w = scale - 1 as diffusers' pipelines give it to a full LCM, sines and cosines of 1000 w."""
    frequencies = torch.exp(torch.arange(width // 2) * (-math.log(10_000) / (width // 2 - 1)))
    angles = 1000 * (guidance_scales[:, None] - 1) * frequencies.to(guidance_scales.device)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Student(Protocol):
    """What is trained, and the frozen teacher beside it or inside it."""

    unet: Any

    def teacher(self) -> AbstractContextManager[Any]:
        """The teacher's network, within a `with`."""


class GuidedStudent(Student, Protocol):
    """One that may read the guidance scale."""

    def embed(self, guidance_scales: Tensor) -> Tensor | None:
        """What the network reads of the scales."""


class LoraStudent:
    """One network in memory: with its LoRA the student, with the averaged LoRA the target, without one the teacher.

    The student begins as the teacher, or with the LoRA that lies in the folder `start`. Raises as `load_lora`.
    """

    def __init__(self, unet: Any, rank: int, targets: Sequence[str] = LORA_TARGETS, start: Path | None = None) -> None:
        self.unet = add_lora(unet, rank, targets)
        if start is not None:
            load_lora(self.unet, start)

    @contextmanager
    def teacher(self) -> Iterator[Any]:
        self.unet.disable_adapters()
        try:
            yield self.unet
        finally:
            self.unet.enable_adapters()

    def embed(self, guidance_scales: Tensor) -> None:
        """Nothing: a LoRA adds no input, so it learns the mean over the range."""


class FullStudent:
    """A network of its own that reads the guidance scale, made from `teacher`, which moves to `dtype`."""

    def __init__(self, teacher: Any, dtype: torch.dtype) -> None:
        self.unet = with_guidance_input(teacher)
        self._teacher = teacher.to(dtype)

    def teacher(self) -> AbstractContextManager[Any]:
        return nullcontext(self._teacher)

    def embed(self, guidance_scales: Tensor) -> Tensor:
        return embed_guidance(guidance_scales)


class Distiller:
    """Teacher, student and averaged student, which is the target. What training needs to go on lies in `out/training`.

    Raises CheckpointError where that is another run's.
    """

    def __init__(
        self,
        student: GuidedStudent,
        diffusion: Diffusion,
        batches: Batches,
        out: Path,
        train: TrainSettings,
        settings: LcmSettings,
        compute: Compute | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.student = student
        self.batches = batches
        self.compute = compute or Compute()
        self.consistency = Consistency(settings, diffusion, self.compute)
        own = {**asdict(settings), **batches.identity, **(identity or {})}
        self.trainer = Trainer(student.unet, out / RUN, train, identity=own)
        self.unconditional = batches.unconditional.to(self.compute.device)

    def distill(self, on_save: Callable[[], None]) -> None:
        """Train to the end of the plan; at each checkpoint `on_save` finds the averaged weights in the student."""
        self.trainer.fit(self.loss, on_save)

    def loss(self, _step: int) -> Tensor:
        batch = self.batches.draw(self.trainer.rng).to(self.compute.device)
        start, end = self.consistency.draw_timesteps(len(batch.latents))
        scales = self.consistency.draw_guidance(len(batch.latents))
        noisy = self.consistency.diffusion.add_noise(batch.latents, torch.randn_like(batch.latents), start)
        target = self._target(noisy, start, end, batch.conditions, scales)  # first: the weights change places in it
        output = self.consistency.apply(self.student.unet, noisy, start, batch.conditions, self.student.embed(scales))
        return self.consistency.loss(output, target)

    @torch.no_grad()
    def _target(self, noisy: Tensor, start: Tensor, end: Tensor, conditions: Conditions, scales: Tensor) -> Tensor:
        with self.student.teacher() as teacher:
            solved = self.consistency.solve(teacher, noisy, start, end, conditions, self.unconditional, scales)
        with self.trainer.averaged_weights():
            return self.consistency.apply(self.student.unet, solved, end, conditions, self.student.embed(scales))


def add_lora(unet: Any, rank: int = LORA_RANK, targets: Sequence[str] = LORA_TARGETS) -> Any:
    """Gives the network a LoRA, in fp32, and freezes the rest. Its strength `alpha` equals the rank, diffusers' default
    on loading."""
    unet.requires_grad_(False).train()
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)))
    for weight in unet.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return unet


def with_guidance_input(teacher: Any) -> Any:
    """A copy in fp32 that reads a guidance scale. That input's weights are zero, so that it begins as the teacher."""
    student: Any = UNet2DConditionModel.from_config(dict(teacher.config), time_cond_proj_dim=GUIDANCE_WIDTH)
    student.load_state_dict(teacher.state_dict(), strict=False)
    nn.init.zeros_(student.time_embedding.cond_proj.weight)
    if teacher.device.type == "cuda":
        student.to(teacher.device).to(memory_format=torch.channels_last)
    return student.train()


def save_lora(unet: Any, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the LoRA as diffusers' `load_lora_weights` reads it."""
    layers = {name: weight.to(dtype).contiguous() for name, weight in get_peft_model_state_dict(unet).items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def load_lora(unet: Any, folder: Path) -> None:
    """Put what `save_lora` wrote in the place of the network's own LoRA.

    Raises LoadError for a file that can't be read, StartError for a LoRA of other layers or of another rank.
    """
    check_weights(folder / LORA_WEIGHT_NAME_SAFE)
    found = {name.removeprefix("unet."): weight for name, weight in load_file(folder / LORA_WEIGHT_NAME_SAFE).items()}
    own = get_peft_model_state_dict(unet)
    for name in sorted(found.keys() | own.keys()):
        there, here = (tuple(layers[name].shape) if name in layers else "missing" for layers in (found, own))
        if there != here:
            wanted = "a LoRA of the same teacher and rank is needed, as fewstep distill writes it"
            raise StartError(f"{folder}: {name} is {there} there, and {here} in the student: {wanted}")
    set_peft_model_state_dict(unet, found)
