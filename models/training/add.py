"""Adversarial diffusion distillation (Sauer et al., arXiv 2311.17042, section 3): a student that draws in one to four
steps, as SDXL-Turbo does.

The student starts as the teacher. At one of a few fixed timesteps it sees a noised picture and predicts the clean one.
Two judges say what it should have been: heads on frozen features, trained beside it to tell its pictures from real ones
(models/training/heads.py), and the teacher, which sees the prediction with fresh noise on it and predicts in its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import EulerAncestralDiscreteScheduler
from torch import Tensor, nn

from models.training.diffusion import Diffusion
from models.training.errors import TeacherError
from models.training.features import Features
from models.training.heads import Heads, deceive, r1_penalty, tell_apart
from models.training.lcm import RUN, Student, guided
from models.training.pictures import Batch, Batches
from models.training.teachers import Conditions, Teacher, call_unet
from models.training.trainer import Compute, Identity, Trainer, TrainSettings

STUDENT_BETAS = (0.5, 0.99)  # of Adam: a long memory of gradients makes adversaries circle each other
HEADS_BETAS = (0.0, 0.99)


@dataclass(frozen=True)
class AddSettings:
    """What defines the distillation, by the paper's names: `distillation` is lambda, `r1` gamma. `heads_rate` is the
    heads' learning rate, `guidance` that of the teacher, 1 for none. `noise_share` is the share of pictures that the
    student begins with noise alone, at its first timestep; None for the paper's even draw."""

    student_timesteps: int = 4
    distillation: float = 2.5
    guidance: float = 3.0
    r1: float = 1e-5
    heads_rate: float = 1e-4
    noise_share: float | None = None


def build_scheduler(teacher: Teacher) -> Any:
    """What the student is sampled with: Euler ancestral, whose steps end at the last training timesteps.

    Raises TeacherError for a teacher that it can't sample.
    """
    scheduler = teacher.build_scheduler(EulerAncestralDiscreteScheduler, timestep_spacing="trailing")
    if scheduler.config.prediction_type == "sample":
        raise TeacherError(
            f"{teacher.name}: its prediction_type is 'sample'; few-step sampling with EulerAncestralDiscreteScheduler "
            "takes epsilon or v_prediction"
        )
    return scheduler


def student_timesteps(scheduler: Any, count: int) -> list[int]:
    """The timesteps of `count` sampling steps, falling: what the student is trained at."""
    scheduler.set_timesteps(count)
    return [int(timestep) for timestep in scheduler.timesteps]


def chances(count: int, noise_share: float | None) -> list[float]:
    """How likely the student begins at each of its `count` timesteps: at the first one `noise_share`, at the others an
    even part of the rest."""
    if noise_share is None or count == 1:
        return [1 / count] * count
    return [noise_share, *[(1 - noise_share) / (count - 1)] * (count - 1)]


class WholeStudent:
    """A copy of `teacher` in fp32, all of it trained; the teacher itself moves to `dtype`."""

    def __init__(self, teacher: Any, dtype: torch.dtype) -> None:
        self.unet = deepcopy(teacher).float().requires_grad_(True).train()
        self._teacher = teacher.to(dtype)

    @contextmanager
    def teacher(self) -> Iterator[Any]:
        yield self._teacher


class Adversary:
    """The loss of one step, of student and heads at once.

    Both learn from the same pictures of the student. Whatever is frozen is differentiated while it is being looked at,
    by the pictures alone: neither the teacher nor the features nor, from the student's loss, the heads get gradients,
    and a teacher that is the student without its LoRA is done before the student's own backward pass begins.
    """

    def __init__(
        self,
        student: Student,
        heads: Heads,
        features: Features,
        diffusion: Diffusion,
        timesteps: Sequence[int],
        settings: AddSettings,
        compute: Compute,
    ) -> None:
        self.student, self.heads, self.features = student, heads, features
        self.diffusion, self.settings, self.compute = diffusion, settings, compute
        self.timesteps = torch.tensor(timesteps, device=compute.device)
        self.chances = torch.tensor(chances(len(timesteps), settings.noise_share))

    def loss(self, batch: Batch, unconditional: Conditions) -> tuple[Tensor, dict[str, Tensor]]:
        """What to minimize, and its parts."""
        starts = self.draw_starts(len(batch.latents))
        made = self.draw(batch, starts)
        looked_at = made.detach().requires_grad_(True)
        with self.student.teacher() as teacher:
            seen = self._look(batch, looked_at, starts)
            adversarial = deceive(self.heads(seen.made, seen.condition))
            distilled = self.score(teacher, looked_at, batch.conditions, unconditional)
            student_loss = adversarial + self.settings.distillation * distilled
            (gradient,) = torch.autograd.grad(student_loss, looked_at)
        real_loss, penalty = self._heads_loss(seen)
        parts = {"adversarial": adversarial, "distillation": distilled, "heads": real_loss, "r1": penalty}
        own = student_loss.detach() + _passing(made, gradient)
        return own + real_loss + self.settings.r1 * penalty, {name: part.detach() for name, part in parts.items()}

    def draw_starts(self, count: int) -> Tensor:
        """Which of its timesteps the student begins each picture at, `"b"`."""
        picks = torch.multinomial(self.chances, count, replacement=True)
        return self.timesteps[picks.to(self.timesteps.device)]

    def draw(self, batch: Batch, starts: Tensor) -> Tensor:
        """The student's pictures, `"b 4 h w"`."""
        return self._predict(self.student.unet, self.begin(batch.latents, starts), starts, batch.conditions)

    def begin(self, latents: Tensor, starts: Tensor) -> Tensor:
        """Real latents, noised. At the last timestep of training it is noise alone, as the sampler's first step has
        it, whether or not the teacher's schedule ends there."""
        noise = torch.randn_like(latents)
        seen = self.signal_seen(starts)[:, None, None, None]
        _, spread = self.diffusion.shares(starts)
        noisy: Tensor = seen * latents + spread * noise
        return noisy

    def signal_seen(self, starts: Tensor) -> Tensor:
        """How much of the real picture the student sees, `"b"`."""
        signal: Tensor = self.diffusion.signal[starts]
        return signal * (starts < self.diffusion.num_timesteps - 1)

    def score(self, teacher: Any, made: Tensor, conditions: Conditions, unconditional: Conditions) -> Tensor:
        """Score distillation: the distance to what the teacher makes of the picture under noise, weighted by the
        signal's share at that noise level, the paper's c(t) = alpha_t."""
        levels = torch.randint(0, self.diffusion.num_timesteps, (len(made),)).to(made.device)
        noisy = self.diffusion.add_noise(made.detach(), torch.randn_like(made), levels)
        wanted = self._teach(teacher, noisy, levels, conditions, unconditional)
        weights: Tensor = self.diffusion.signal[levels]
        return (weights * F.mse_loss(made, wanted, reduction="none").mean((1, 2, 3))).mean()

    @torch.no_grad()
    def _teach(
        self, teacher: Any, noisy: Tensor, levels: Tensor, conditions: Conditions, unconditional: Conditions
    ) -> Tensor:
        if self.settings.guidance == 1:
            return self._predict(teacher, noisy, levels, conditions)
        both = Conditions.stack([conditions, unconditional.spread_over(conditions)])
        clean = self._predict(teacher, noisy.repeat(2, 1, 1, 1), levels.repeat(2), both)
        return guided(clean, torch.full((len(noisy),), self.settings.guidance, device=noisy.device))

    def _predict(self, unet: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """x0."""
        with self.compute.autocast():
            output = call_unet(unet, noisy, timesteps, conditions)
        clean, _ = self.diffusion.split(noisy, output, timesteps)
        return clean

    def _look(self, batch: Batch, made: Tensor, starts: Tensor) -> Seen:
        levels = self.features.draw_levels(len(made))
        with torch.no_grad():
            real = self.features.extract(batch.latents, levels, batch.conditions)
            summary = self.features.summarize(batch.latents, batch.conditions)
        condition = self.heads.condition(batch.conditions, summary, self.signal_seen(starts), levels)
        return Seen(real, self.features.extract(made, levels, batch.conditions), condition)

    def _heads_loss(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Hinge loss, and the R1 penalty at real pictures."""
        real = [features.requires_grad_(True) for features in seen.real]
        logits = self.heads(real, seen.condition)
        made = self.heads([features.detach() for features in seen.made], seen.condition)
        return tell_apart(logits, made), r1_penalty(real, logits)


@dataclass(frozen=True)
class Seen:
    """What the heads judge: maps of real pictures and of the student's, and the condition of both."""

    real: list[Tensor]
    made: list[Tensor]
    condition: Tensor


def _passing(made: Tensor, gradient: Tensor) -> Tensor:
    """Zero, with this gradient by `made`."""
    product = (made * gradient).sum()
    return product - product.detach()


class AddDistiller:
    """Student and heads in one training. What it needs to go on lies in `out/training`.

    Raises CheckpointError where that is another run's.
    """

    def __init__(
        self,
        student: Student,
        features: Features,
        diffusion: Diffusion,
        timesteps: Sequence[int],
        batches: Batches,
        out: Path,
        train: TrainSettings,
        settings: AddSettings,
        compute: Compute | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.batches = batches
        self.compute = compute or Compute()
        self.unconditional = batches.unconditional.to(self.compute.device)
        torch.manual_seed(train.seed)
        heads = build_heads(features, self.unconditional).to(self.compute.device)
        self.adversary = Adversary(student, heads, features, diffusion, timesteps, settings, self.compute)
        self.trainer = Trainer(
            nn.ModuleDict({"student": student.unet, "heads": heads}),
            out / RUN,
            train,
            _groups(student.unet, heads, train, settings),
            {**asdict(settings), **features.identity, **batches.identity, **(identity or {})},
        )

    def distill(self, on_save: Callable[[], None]) -> None:
        """Train to the end of the plan; at each checkpoint `on_save` finds the averaged weights in the student."""
        self.trainer.fit(self.loss, on_save)

    def loss(self, _step: int) -> Tensor:
        batch = self.batches.draw(self.trainer.rng).to(self.compute.device)
        loss, self.trainer.parts = self.adversary.loss(batch, self.unconditional)
        return loss


def build_heads(features: Features, text: Conditions) -> Heads:
    """For these features and texts of this width."""
    pooled = 0 if text.pooled is None else text.pooled.shape[-1]
    return Heads(features.channels, text.states.shape[-1], pooled)


def _groups(unet: nn.Module, heads: Heads, train: TrainSettings, settings: AddSettings) -> list[dict[str, Any]]:
    """Two optimizers in one: each has its own rate and memory, and is clipped by its own norm."""
    student = [weight for weight in unet.parameters() if weight.requires_grad]
    own = {"lr": settings.heads_rate, "betas": HEADS_BETAS, "weight_decay": 0.0, "clip": train.clip}
    return [{"params": student, "betas": STUDENT_BETAS}, {"params": list(heads.parameters()), **own}]
