"""The training loop every stage shares: averaged weights, cosine rate, checkpoints that resume exactly, a loss log."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm  # type: ignore[import-untyped]

CHECKPOINT = "checkpoint.pt"
LOG = "loss.csv"

LossFunction = Callable[[int], Tensor]
Callback = Callable[[], None]


@dataclass(frozen=True)
class TrainSettings:
    """How long and how fast. `steps` is the whole plan: the cosine ends there, however often a run is interrupted."""

    steps: int
    rate: float = 1e-3
    warmup: int = 100
    final_share: float = 0.02
    ema_decay: float = 0.998
    clip: float = 1.0
    weight_decay: float = 1e-3
    save_every: int = 500
    log_every: int = 20
    seed: int = 0

    def rate_share(self, step: int) -> float:
        """Share of the full rate at `step`: linear warm-up, then a cosine down to `final_share`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * progress))


class Trainer:
    """Trains one module. Everything that decides the next step is in its checkpoint, random states included."""

    def __init__(
        self,
        model: nn.Module,
        out: Path,
        settings: TrainSettings,
        groups: Iterable[dict[str, Any]] | None = None,
    ) -> None:
        self.model = model
        self.out = out
        self.settings = settings
        self.step = 0
        self.rng = random.Random(settings.seed)
        torch.manual_seed(settings.seed)
        self.ema = AveragedModel(model, multi_avg_fn=averaging(settings.ema_decay))
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            list(groups) if groups is not None else trainable,
            lr=settings.rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, settings.rate_share)
        out.mkdir(parents=True, exist_ok=True)
        self.resume()

    @property
    def averaged(self) -> Any:
        """The model with averaged weights."""
        return self.ema.module

    def fit(self, loss_of: LossFunction, on_save: Callback | None = None, until: int | None = None) -> None:
        """Train from the current step up to the plan's end (or `until`); `loss_of` gets the step's number."""
        end = min(self.settings.steps, until or self.settings.steps)
        with short_attention(), tqdm(total=end, initial=self.step, desc=self.out.name, mininterval=2.0) as bar:
            while self.step < end:
                loss = self._update(loss_of(self.step))
                bar.update()
                if self.step % self.settings.log_every == 0:
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                    self._log(loss)
                if self.step % self.settings.save_every == 0 or self.step == end:
                    self.save()
                    if on_save is not None:
                        on_save()

    def _update(self, loss: Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.schedule.step()
        self.ema.update_parameters(self.model)
        self.step += 1
        return float(loss.detach())

    def _log(self, loss: float) -> None:
        path = self.out / LOG
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(("step", "loss", "rate"))
            writer.writerow((self.step, f"{loss:.6f}", f"{self.schedule.get_last_lr()[0]:.3e}"))

    def save(self) -> None:
        """Write the checkpoint; a crash in the middle leaves the former one intact."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "python_rng": self.rng.getstate(),
            "torch_rng": torch.get_rng_state(),
        }
        unfinished = self.out / f"{CHECKPOINT}.part"
        torch.save(state, unfinished)
        unfinished.replace(self.out / CHECKPOINT)

    def resume(self) -> None:
        """Continue from the checkpoint in `out`, if there is one."""
        path = self.out / CHECKPOINT
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        version, internal, gauss = state["python_rng"]
        self.rng.setstate((version, tuple(internal), gauss))
        torch.set_rng_state(state["torch_rng"])


def averaging(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """Exponential averaging that forgets its beginning: the first steps are averaged over a tenth of their number."""

    def update(averages: Sequence[Tensor], currents: Sequence[Tensor], count: Tensor | int) -> None:
        torch._foreach_lerp_(list(averages), list(currents), 1 - min(decay, (1 + int(count)) / (10 + int(count))))

    return update


def autocast() -> torch.autocast:
    """bf16 for the forward passes; the weights stay in fp32."""
    return torch.autocast("cpu", torch.bfloat16)


def short_attention() -> AbstractContextManager[None]:
    """Plain attention: on a CPU and with few tokens, the fused kernel's backward pass costs a third of a step."""
    return sdpa_kernel(SDPBackend.MATH)
