"""The models of one device: each is loaded, then warmed, and from then on serves; one that fails takes no other along.

All belongs to the engine thread, but for what the properties tell.
"""

from __future__ import annotations

import enum
import gc
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from broker.messages import ModelStatus, WarmModel
from models.catalog import ModelSpec
from models.hub.errors import HubUnavailable
from models.hub.lockfile import LOCK_FILE
from models.loading import LoadError
from models.memory import GIB, Estimate, estimate
from workers.engine import Engine
from workers.engine.calibration import WarmUpError, warm_up_in_turns
from workers.engine.runner import ModelRunner
from workers.memory import RESERVE, free_bytes, used_bytes
from workers.metrics import WorkerMetrics

logger = logging.getLogger(__name__)

MAX_REASON_CHARS = 500
FOLDERS = re.compile(r"(?<![\w.:/~-])~?/(?:[^\s/'\",:;]+/)*(?=[^\s/'\",:;])")  # of an absolute path
Load = Callable[[ModelSpec], ModelRunner]
Report = Callable[[str, str], None]


class ModelState(enum.Enum):
    WAITING = "waiting"
    LOADING = "loading"
    WARMING = "warming"
    WARM = "warm"
    FAILED = "failed"


FOLLOWS = {
    ModelState.LOADING: {ModelState.WAITING},
    ModelState.WARMING: {ModelState.LOADING},
    ModelState.WARM: {ModelState.WARMING},
    ModelState.FAILED: {ModelState.LOADING, ModelState.WARMING},
}


class NothingToServe(Exception):
    """Every model has failed; the message says why, a line for each."""


class NothingForNow(NothingToServe):
    """Every model has failed, and at least one of them only because the Hub was away: a new start may help."""


class DoesNotFit(Exception):
    """The memory that is left is too small for the model; the message says what to change."""


@dataclass(slots=True)
class Member:
    """One model of the set. `runner` is there from its loading on; `lacks_hub` if it failed for want of the Hub."""

    spec: ModelSpec
    state: ModelState = ModelState.WAITING
    detail: str = ""
    runner: ModelRunner | None = None
    lacks_hub: bool = False

    @property
    def status(self) -> ModelStatus:
        state: Literal["waiting", "loading", "warming", "warm", "failed"] = self.state.value
        return ModelStatus(self.spec.name, state, without_folders(self.detail))


class MemoryBudget:
    """What the models of `device` may take together: `limit_gib`, or what is free less a reserve."""

    def __init__(self, device: torch.device, limit_gib: float | None, lock_file: Path = LOCK_FILE) -> None:
        self._is_given = limit_gib is not None
        self._total = free_bytes(device) * (1 - RESERVE) if limit_gib is None else limit_gib * GIB
        self._lock_file = lock_file
        self._taken: dict[str, Estimate] = {}

    @property
    def left(self) -> float:
        return self._total - sum(taken.needed for taken in self._taken.values())

    def reserve(self, spec: ModelSpec, dtype: str) -> Estimate | None:
        """Its part of the budget, and None where nobody knows how much it takes. Raises DoesNotFit."""
        loaded = {network for taken in self._taken.values() for network in taken.networks}
        if (needed := estimate(spec, dtype, loaded, lock_file=self._lock_file)) is None:
            return None
        if needed.needed > self.left:
            raise DoesNotFit(
                f"it needs about {needed.needed / GIB:.2f} GiB and {max(0.0, self.left) / GIB:.2f} GiB are left "
                f"{f'of FEWSTEP_MEMORY_GIB={self._total / GIB:g}' if self._is_given else 'of what is free'}: "
                f"take models out of FEWSTEP_MODELS or raise FEWSTEP_MEMORY_GIB"
            )
        self._taken[spec.name] = needed
        return needed

    def record(self, model: str, num_bytes: int) -> None:
        """What a model of unknown size was seen to take."""
        self._taken[model] = Estimate(num_bytes, shared=0, working=0, networks=frozenset())

    def release(self, model: str) -> None:
        self._taken.pop(model, None)


class WarmSet:
    """`specs` in the order of their importance. `load` makes a runner of one in the dtype of `dtype_of`, `on_warm` gets
    it once it is proven, and `on_change` is called whenever something is new to be told. `ready` is done as soon as one
    model is warm, or fails with NothingToServe.
    """

    def __init__(
        self,
        specs: Mapping[str, ModelSpec],
        load: Load,
        *,
        device: torch.device,
        dtype_of: Callable[[ModelSpec], str],
        make_budget: Callable[[], MemoryBudget],
        metrics: WorkerMetrics,
        on_warm: Callable[[ModelRunner], None],
        on_change: Callable[[], None],
        report: Report,
    ) -> None:
        self.ready: Future[None] = Future()
        self._members = {name: Member(spec) for name, spec in specs.items()}
        self._load, self._device, self._metrics = load, device, metrics
        self._dtype_of, self._make_budget = dtype_of, make_budget
        self._on_warm, self._on_change, self._report = on_warm, on_change, report
        self._is_given_up = False
        for member in self._members.values():
            self._show_state(member)

    @property
    def statuses(self) -> tuple[ModelStatus, ...]:
        return tuple(member.status for member in self._members.values())

    @property
    def warm_models(self) -> tuple[WarmModel, ...]:
        runners = (member.runner for member in self._members.values() if member.state is ModelState.WARM)
        return tuple(runner.warm_model for runner in runners if runner is not None and runner.warm_model is not None)

    def give_up(self) -> None:
        """No more turns: what isn't warm by now stays so."""
        self._is_given_up = True

    def start(self, engine: Engine) -> Iterator[None]:
        """Loads all models, then warms one after the other and gives it to `engine`; may pause at each `yield`.

        Files are read before anything serves, since nothing can be drawn meanwhile. Warming takes far longer, but its
        pieces are as small as a step.
        """
        budget = self._make_budget()  # now: what is free changes
        for work in (self._load_in_turn, self._warm_in_turns):
            for member in self._members.values():
                for _ in work(member, budget, engine):
                    yield
                    if self._is_given_up:
                        return
        if not self.ready.done():
            reasons = (f"{member.spec.name}: {member.detail}" for member in self._members.values())
            kind = NothingForNow if any(member.lacks_hub for member in self._members.values()) else NothingToServe
            self.ready.set_exception(kind("\n".join(reasons)))

    def update(self, specs: Mapping[str, ModelSpec]) -> None:
        """Goes by other readings of the entries from now on; each is one that its loaded model can do."""
        for name, member in self._members.items():
            try:
                if member.runner is not None:
                    member.runner.update(specs[name])
                member.spec = specs[name]
            except Exception as error:  # noqa: BLE001 - the model goes on with what it had
                logger.error("%s goes on with its old entry of the catalog: %s", name, explain(error))
        self._on_change()

    def _load_in_turn(self, member: Member, budget: MemoryBudget, _engine: Engine) -> Iterator[None]:
        self._enter(member, ModelState.LOADING, "loading")
        reason = None
        try:
            needed = budget.reserve(member.spec, self._dtype_of(member.spec))
            before = used_bytes(self._device)
            member.runner = self._load(member.spec)
            measured = max(0, used_bytes(self._device) - before)
            if needed is None:
                budget.record(member.spec.name, measured)
            self._note_memory(member, needed, measured)
        except Exception as error:  # noqa: BLE001 - whatever one model's files raise, the others go on
            reason, member.lacks_hub = explain(error), lacks_hub(error)
        if reason is not None:  # the error is gone by now, and with its frames all that they held
            self._fail(member, budget, reason)
        yield

    def _warm_in_turns(self, member: Member, budget: MemoryBudget, engine: Engine) -> Iterator[None]:
        if member.runner is None:
            return
        name, reason = member.spec.name, None
        self._enter(member, ModelState.WARMING, "warming")
        try:
            yield from warm_up_in_turns(
                Engine({name: member.runner}), name, lambda at: self._tell(member, f"warming {at}")
            )
        except Exception as error:  # noqa: BLE001 - as above
            reason = explain(error)
        if reason is not None:
            self._fail(member, budget, reason)
            return
        self._enter(member, ModelState.WARM, "")
        engine.runners[name] = member.runner
        self._on_warm(member.runner)
        self._report(name, "warm")
        if not self.ready.done():
            self.ready.set_result(None)

    def _fail(self, member: Member, budget: MemoryBudget, reason: str) -> None:
        """Gives back what it had taken. Raises again where the device itself is lost: then nothing can run."""
        name, member.runner = member.spec.name, None
        self._enter(member, ModelState.FAILED, reason)
        budget.release(name)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
        logger.error("%s does not serve: %s", name, reason)
        self._report(name, "failed")

    def _note_memory(self, member: Member, needed: Estimate | None, measured: int) -> None:
        memory, name = self._metrics.model_memory, member.spec.name
        memory.labels(name, "measured").set(measured)
        guess = "nobody knew how much: its files were not here and its entry has no memory_gib"
        if needed is not None:
            memory.labels(name, "estimated").set(needed.weights)
            guess = f"estimated {needed.weights / GIB:.2f} GiB, and {needed.working / GIB:.2f} GiB to work with"
            guess += f"; {needed.shared / GIB:.2f} GiB shared with other models" if needed.shared else ""
        logger.info("%s took %.2f GiB of memory (%s)", name, measured / GIB, guess)

    def _enter(self, member: Member, state: ModelState, detail: str) -> None:
        assert member.state in FOLLOWS[state], f"{member.spec.name}: {state} does not follow {member.state}"
        member.state = state
        self._show_state(member)
        self._tell(member, detail)

    def _show_state(self, member: Member) -> None:
        for state in ModelState:
            self._metrics.model_state.labels(member.spec.name, state.value).set(member.state is state)
        self._metrics.warm.labels(member.spec.name).set(member.state is ModelState.WARM)

    def _tell(self, member: Member, detail: str) -> None:
        member.detail = detail
        if member.state in (ModelState.LOADING, ModelState.WARMING):
            self._report(member.spec.name, detail)
        self._on_change()


def without_folders(text: str) -> str:
    """What callers read: the files of this machine by their names alone. Repositories and addresses stay whole."""
    return FOLDERS.sub("", text)


def lacks_hub(error: BaseException | None) -> bool:
    """Whether it comes of a Hub that can't be reached now."""
    return error is not None and (isinstance(error, HubUnavailable) or lacks_hub(error.__cause__))


def explain(error: Exception) -> str:
    """One line for the log, and without the folders for the registry and the callers of the model."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "the device ran out of memory: lower its max_batch_size or take models out of FEWSTEP_MODELS"
    if not isinstance(error, LoadError | WarmUpError | DoesNotFit):
        logger.error("not an error that was thought of", exc_info=error)
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:MAX_REASON_CHARS]
