"""Who decides which rows run the next step. Plain Python: every batching rule is a millisecond test."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

SWITCHING_SHARE = 0.1  # of the time, when requests with different LoRAs compete


class Schedulable(Protocol):
    """What the scheduler needs to know of a request.

    Requests of one group share a forward pass. `loras` are part of their group, and the only part that takes time to
    change: a model computes with one set of them at a time. Who isn't ready takes no part yet.
    """

    @property
    def group(self) -> Hashable: ...
    @property
    def model(self) -> str: ...
    @property
    def loras(self) -> Hashable: ...
    @property
    def is_ready(self) -> bool: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def due_s(self) -> float: ...


R = TypeVar("R", bound=Schedulable)


@dataclass(frozen=True, slots=True)
class Batch(Generic[R]):
    """One forward pass. All requests are of one group; the `admitted` ones take part for the first time."""

    requests: tuple[R, ...]
    admitted: tuple[R, ...]


class Turns(Generic[R]):
    """Which LoRAs a model computes with next.

    Those in place keep their turn until nobody wants them or they have used up their quantum: as much computing as
    leaves `SWITCHING_SHARE` of the time for the switch that began it. Then it is the turn of the most urgent of the
    others. So that one waits for one quantum and one step at most, beside what other models compute meanwhile.
    `switch_s(model)` is what a switch takes.
    """

    def __init__(self, switch_s: Callable[[str], float]) -> None:
        self._switch_s = switch_s
        self._turns: dict[str, _Turn] = {}

    def choose(self, requests: Sequence[R]) -> list[R]:
        """Those requests of one model whose LoRAs have the turn."""
        turn = self._turns.get(requests[0].model)
        others = [request for request in requests if turn is None or request.loras != turn.loras]
        if turn is not None and (not others or (len(others) < len(requests) and not self._is_over(turn))):
            return [request for request in requests if request.loras == turn.loras]
        loras = min(others, key=_due).loras
        return [request for request in others if request.loras == loras]

    def charge(self, request: R, seconds: float) -> None:
        """Somebody's batch has run for so long; it may have been the first of a turn."""
        turn = self._turns.get(request.model)
        if turn is None or turn.loras != request.loras:
            turn = self._turns[request.model] = _Turn(request.model, request.loras)
        turn.used_s += seconds

    def _is_over(self, turn: _Turn) -> bool:
        return turn.used_s >= self._switch_s(turn.model) * (1 / SWITCHING_SHARE - 1)


@dataclass(slots=True)
class _Turn:
    model: str
    loras: Hashable
    used_s: float = 0.0


class Scheduler(Generic[R]):
    """Two rooms: `waiting` and `running`. A request enters the running batch of its group at any step, as soon as
    its rows fit under `max_rows(request)`. Of several groups (models, sizes) the one with the most urgent request runs;
    of those that differ in LoRAs only one has the turn.

    Nobody starves: a request's due time never moves, so what comes much later is due later.
    """

    def __init__(self, max_rows: Callable[[R], int], switch_s: Callable[[str], float] = lambda _: 0.0) -> None:
        self.max_rows = max_rows
        self._turns: Turns[R] = Turns(switch_s)
        self.waiting: list[R] = []
        self.running: list[R] = []

    def add(self, request: R) -> None:
        self.waiting.append(request)

    def remove(self, request: R) -> None:
        """Takes a finished or stopped request out of its room."""
        for room in (self.running, self.waiting):
            if request in room:
                room.remove(request)

    def put_back(self, request: R) -> None:
        """Sends a running request to the waiting room."""
        self.remove(request)
        self.waiting.append(request)

    @property
    def requests(self) -> list[R]:
        return self.running + self.waiting

    def schedule(self) -> Batch[R] | None:
        """The next step's batch; None when there is no work that could be done now."""
        eligible = self._eligible()
        if not eligible:
            return None
        group = min(eligible, key=_due).group
        running = [request for request in self.running if request.group == group]
        admitted = self._admit(group, sum(request.num_rows for request in running))
        return Batch((*running, *admitted), tuple(admitted))

    def charge(self, batch: Batch[R], seconds: float) -> None:
        """How long a batch has run."""
        self._turns.charge(batch.requests[0], seconds)

    def _eligible(self) -> list[R]:
        models: defaultdict[str, list[R]] = defaultdict(list)
        for request in self.requests:
            if request.is_ready:
                models[request.model].append(request)
        return [request for requests in models.values() for request in self._turns.choose(requests)]

    def _admit(self, group: Hashable, num_rows: int) -> list[R]:
        """The most urgent first. Who doesn't fit is not overtaken by narrower ones."""
        admitted: list[R] = []
        candidates = (request for request in self.waiting if request.group == group)
        for request in sorted(candidates, key=_due):
            num_rows += request.num_rows
            is_alone = num_rows == request.num_rows  # wider than any batch, it must still go through
            if num_rows > self.max_rows(request) and not is_alone:
                break
            admitted.append(request)
        for request in admitted:
            self.waiting.remove(request)
        self.running += admitted
        return admitted


def _due(request: Schedulable) -> float:
    return request.due_s
