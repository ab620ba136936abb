"""The training loop every stage shares: averaged weights, cosine rate, checkpoints that resume exactly, a loss log."""

from __future__ import annotations

import csv
import math
import pickle
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm  # type: ignore[import-untyped]

from models.networks import first_line
from models.training.errors import CheckpointError, Diverged, Interrupted

CHECKPOINT = "checkpoint.pt"
LOG = "loss.csv"
FREE_SETTINGS = ("save_every", "log_every")  # which may change in the middle of a run
CPU = torch.device("cpu")

LossFunction = Callable[[int], Tensor]
Callback = Callable[[], None]
Identity = Mapping[str, Any]  # of plain values


@dataclass(frozen=True)
class TrainSettings:
    """How long and how fast. `steps` is the whole plan: the cosine ends there, however often a run is interrupted.
    One step is `accumulate` batches."""

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
    accumulate: int = 1

    def rate_share(self, step: int) -> float:
        """Share of the full rate at `step`: linear warm-up, then a cosine down to `final_share`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Compute:
    """Where a training runs, and what its forward passes compute in."""

    device: torch.device = CPU
    dtype: torch.dtype = torch.bfloat16

    def autocast(self) -> AbstractContextManager[Any]:
        """Trained weights stay in fp32; with `dtype` float32 this does nothing."""
        is_half = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if is_half else nullcontext()


class Trainer:
    """Trains what requires gradients in one module, on the device where it is.

    Everything that decides the next step is in its checkpoint, random states included; frozen weights are not, nor are
    they averaged: of a network with a LoRA only the LoRA. `groups` are AdamW's; one with a norm `clip` of its own is
    clipped apart from the others. `identity` is what else a checkpoint must have been made with, such as the data's
    fingerprint. What `loss_of` puts into `parts` is logged beside the loss. Raises CheckpointError where `out` holds
    the checkpoint of another run.
    """

    def __init__(
        self,
        model: nn.Module,
        out: Path,
        settings: TrainSettings,
        groups: Iterable[dict[str, Any]] | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.model: Any = model
        self.out = out
        self.settings = settings
        self.step = 0
        self.parts: dict[str, Tensor] = {}
        self.rng = random.Random(settings.seed)
        torch.manual_seed(settings.seed)
        self.trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.device = next(iter(self.trainable.values())).device
        self.averages = Averages(self.trainable, settings.ema_decay)
        self.optimizer = torch.optim.AdamW(
            list(groups) if groups is not None else list(self.trainable.values()),
            lr=settings.rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, settings.rate_share)
        self._identity = {**asdict(settings), **(identity or {})}
        self._is_stopping = False
        out.mkdir(parents=True, exist_ok=True)
        self.resume()

    @property
    def is_done(self) -> bool:
        return self.step >= self.settings.steps

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within it the model has the averaged weights. They change places, so it costs no memory; not for anything
        whose backward pass comes later."""
        self.averages.swap()
        try:
            yield
        finally:
            self.averages.swap()

    def keep_average(self) -> Any:
        """The model, with the averaged weights for good: the end of its training."""
        self.averages.swap()
        return self.model

    def fit(self, loss_of: LossFunction, on_save: Callback | None = None, until: int | None = None) -> None:
        """Train from the current step up to the plan's end (or `until`); `loss_of` gets the step's number.

        At each checkpoint, and where nothing is left to train, `on_save` finds the averaged weights in the model.
        Whatever random numbers it draws, the training goes on as without it. Raises Diverged, Interrupted after
        Ctrl-C, and CheckpointError where none can be written.
        """
        if self.is_done:
            self._show(on_save)
        end = min(self.settings.steps, until or self.settings.steps)
        bar = tqdm(total=end, initial=self.step, desc=self.out.name, mininterval=2.0)
        with _fast_attention(self.device), self._stops_between_steps(), bar:
            while self.step < end:
                loss = self._update(loss_of)
                bar.update()
                if self.step % self.settings.log_every == 0:
                    bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
                    self._log(float(loss))
                if self.step % self.settings.save_every == 0 or self.step == end or self._is_stopping:
                    self.save()
                    self._show(on_save)
                if self._is_stopping:
                    raise Interrupted(self.step, self.settings.steps)

    def _update(self, loss_of: LossFunction) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for _ in range(self.settings.accumulate):
            loss = loss_of(self.step) / self.settings.accumulate
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self._clip()
        self.optimizer.step()
        self.schedule.step()
        self.averages.update()
        self.step += 1
        return total

    def _clip(self) -> None:
        groups = self.optimizer.param_groups
        for group in groups:
            if "clip" in group:
                torch.nn.utils.clip_grad_norm_(group["params"], group["clip"])
        others = [weight for group in groups if "clip" not in group for weight in group["params"]]
        torch.nn.utils.clip_grad_norm_(others, self.settings.clip)

    def _log(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at step {self.step}: {self._remedy}")
        path = self.out / LOG
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(("step", "loss", "rate", *self.parts))
            parts = (f"{float(part):.6f}" for part in self.parts.values())
            writer.writerow((self.step, f"{loss:.6f}", f"{self.schedule.get_last_lr()[0]:.3e}", *parts))

    @contextmanager
    def _stops_between_steps(self) -> Iterator[None]:
        """The first Ctrl-C ends the run after the step that is under way, the second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = signal.getsignal(signal.SIGINT)

        def stop(_number: int, _frame: object) -> None:
            self._is_stopping = True
            signal.signal(signal.SIGINT, former)

        signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, former)

    def _show(self, on_save: Callback | None) -> None:
        if on_save is not None:
            with self.averaged_weights(), torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                on_save()

    def save(self) -> None:
        """Write the checkpoint; a crash in the middle leaves the former one intact. Raises Diverged instead of writing
        what nothing can go on from, and CheckpointError for a full disk."""
        self._check_sound()
        state = {
            "identity": self._identity,
            "step": self.step,
            "model": self._own_state(),
            "averages": self.averages.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "python_rng": self.rng.getstate(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        unfinished = self.out / f"{CHECKPOINT}.part"
        try:
            torch.save(state, unfinished)
        except RuntimeError as error:  # as torch says it
            unfinished.unlink(missing_ok=True)
            raise CheckpointError(f"{unfinished} can't be written; is the disk full? {first_line(error)}") from error
        unfinished.replace(self.out / CHECKPOINT)

    def _check_sound(self) -> None:
        if not all(bool(weight.isfinite().all()) for weight in self.trainable.values()):
            raise Diverged(f"weights are no numbers at step {self.step}: {self._remedy}")

    @property
    def _remedy(self) -> str:
        return f"try a lower rate than {self.settings.rate:g}"

    def resume(self) -> None:
        """Continue from the checkpoint in `out`, if there is one."""
        path = self.out / CHECKPOINT
        if not path.exists():
            return
        state = _read_checkpoint(path)
        self._check_identity(path, state.get("identity", {}))
        self.step = state["step"]
        self.model.load_state_dict(state["model"], strict=False)
        self.averages.load_state_dict(state["averages"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        version, internal, gauss = state["python_rng"]
        self.rng.setstate((version, tuple(internal), gauss))
        torch.set_rng_state(state["torch_rng"].clone())
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"].clone(), self.device)
        self._forget_later_losses()

    def _own_state(self) -> dict[str, Tensor]:
        """What this training changes: trained weights, and buffers."""
        frozen = {name for name, weight in self.model.named_parameters() if not weight.requires_grad}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in frozen}

    def _check_identity(self, path: Path, written: Identity) -> None:
        """Raises CheckpointError for a checkpoint that these settings would continue otherwise than they began."""
        for name in sorted({*written, *self._identity} - set(FREE_SETTINGS)):
            then, now = written.get(name), self._identity.get(name)
            if then != now:
                raise CheckpointError(
                    f"{path} was written with {name} = {then}, and now it is {now}: "
                    "give the same again, or another folder to write to"
                )

    def _forget_later_losses(self) -> None:
        """Of steps that a crash undid, and the line that it broke off."""
        path = self.out / LOG
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if whole:
            path.write_text(whole[0] + "".join(row for row in whole[1:] if int(row.split(",")[0]) <= self.step))
        else:
            path.unlink(missing_ok=True)


class Averages:
    """Exponential averages of weights, which forget their beginning: the first steps are averaged over a tenth of their
    number."""

    def __init__(self, weights: Mapping[str, nn.Parameter], decay: float) -> None:
        self._weights = weights
        self._averages = {name: weight.detach().clone() for name, weight in weights.items()}
        self._decay = decay
        self._count = 0

    @torch.no_grad()
    def update(self) -> None:
        share = 1 - min(self._decay, (1 + self._count) / (10 + self._count)) if self._count else 1.0
        torch._foreach_lerp_(list(self._averages.values()), list(self._weights.values()), share)
        self._count += 1

    def swap(self) -> None:
        """The weights take the averages' place, and the averages theirs."""
        for name, weight in self._weights.items():
            weight.data, self._averages[name] = self._averages[name], weight.data

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "averages": self._averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._count = state["count"]
        for name, average in self._averages.items():
            average.copy_(state["averages"][name])


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """Its weights stay on disk until they are read. Raises CheckpointError for a damaged file."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} can't be read as a checkpoint; delete it to begin anew: {first_line(error)}"
        ) from error
    return state


def autocast() -> AbstractContextManager[Any]:
    """bf16 for the forward passes on a CPU."""
    return Compute().autocast()


def _fast_attention(device: torch.device) -> AbstractContextManager[None]:
    """Plain attention on a CPU: with few tokens, the fused kernel's backward pass costs a third of a step."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
