"""Who decides which rows run the next step. Plain Python: every batching rule is a millisecond test."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Generic, Protocol, TypeVar


class Schedulable(Protocol):
    """What the scheduler needs to know of a request."""

    @property
    def model(self) -> str: ...
    @property
    def group(self) -> Hashable: ...
    @property
    def num_rows(self) -> int: ...


R = TypeVar("R", bound=Schedulable)


@dataclass(frozen=True, slots=True)
class Batch(Generic[R]):
    """One forward pass. All requests are of one group; the `admitted` ones take part for the first time."""

    requests: tuple[R, ...]
    admitted: tuple[R, ...]


class Scheduler(Generic[R]):
    """Two rooms: `waiting` and `running`. A request enters the running batch of its group at any step, as soon as
    its rows fit under `max_rows` of its model; groups take turns, step by step."""

    def __init__(self, max_rows: Mapping[str, int]) -> None:
        self.max_rows = dict(max_rows)
        self.waiting: list[R] = []
        self.running: list[R] = []
        self._turn = count(1)
        self._last_turn: dict[Hashable, int] = {}

    def add(self, request: R) -> None:
        self.waiting.append(request)

    def remove(self, request: R) -> None:
        """Takes a finished or stopped request out of its room."""
        for room in (self.running, self.waiting):
            if request in room:
                room.remove(request)

    def put_back(self, request: R) -> None:
        """Sends a running request to the head of the waiting room."""
        self.remove(request)
        self.waiting.insert(0, request)

    @property
    def requests(self) -> list[R]:
        return self.running + self.waiting

    def schedule(self) -> Batch[R] | None:
        """The next step's batch, of the group that has waited longest for a turn; None when there is no work."""
        if not self.requests:
            return None
        groups = {request.group for request in self.requests}
        self._last_turn = {group: self._last_turn.get(group, 0) for group in groups}
        group = min((request.group for request in self.requests), key=self._last_turn.__getitem__)
        self._last_turn[group] = next(self._turn)
        running = [request for request in self.running if request.group == group]
        admitted = self._admit(group, sum(request.num_rows for request in running))
        return Batch((*running, *admitted), tuple(admitted))

    def _admit(self, group: Hashable, num_rows: int) -> list[R]:
        admitted: list[R] = []
        for request in [request for request in self.waiting if request.group == group]:
            num_rows += request.num_rows
            is_alone = num_rows == request.num_rows  # wider than any batch, it must still go through
            if num_rows > self.max_rows[request.model] and not is_alone:
                break
            admitted.append(request)
        for request in admitted:
            self.waiting.remove(request)
        self.running += admitted
        return admitted
