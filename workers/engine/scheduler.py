"""Who decides which rows run the next step. Plain Python: every batching rule is a millisecond test."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Schedulable(Protocol):
    """What the scheduler needs to know of a request."""

    @property
    def group(self) -> Hashable: ...
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


class Scheduler(Generic[R]):
    """Two rooms: `waiting` and `running`. A request enters the running batch of its group at any step, as soon as
    its rows fit under `max_rows(request)`. Of several groups (models, sizes) the one with the most urgent request runs.

    Nobody starves: a request's due time never moves, so what comes much later is due later.
    """

    def __init__(self, max_rows: Callable[[R], int]) -> None:
        self.max_rows = max_rows
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
        """The next step's batch; None when there is no work."""
        if not self.requests:
            return None
        group = min(self.requests, key=_due).group
        running = [request for request in self.running if request.group == group]
        admitted = self._admit(group, sum(request.num_rows for request in running))
        return Batch((*running, *admitted), tuple(admitted))

    def _admit(self, group: Hashable, num_rows: int) -> list[R]:
        """The most urgent first. Who doesn't fit is not overtaken by narrower ones."""
        admitted: list[R] = []
        for request in sorted((request for request in self.waiting if request.group == group), key=_due):
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
