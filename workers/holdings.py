"""What this worker holds: requests it has taken and not ended yet, and the room left for more."""

from __future__ import annotations

from broker.messages import Delivery
from workers.engine.request import RequestState


class Holdings:
    """A request is owned from delivery until its end is in Redis; it takes rows until the engine is done with it."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self._owned: dict[str, Delivery] = {}
        self._rows: dict[str, int] = {}

    def take(self, delivery: Delivery) -> None:
        request = RequestState(delivery)
        self._owned[request.request_id] = delivery
        self._rows[request.request_id] = request.num_rows

    def free_rows(self, request_id: str) -> None:
        """The engine is done with it; its end is still to be published."""
        self._rows.pop(request_id, None)

    def release(self, request_id: str) -> None:
        """Ended, or another worker's by now."""
        self._owned.pop(request_id, None)
        self._rows.pop(request_id, None)

    def owns(self, request_id: str) -> bool:
        return request_id in self._owned

    @property
    def request_ids(self) -> list[str]:
        return list(self._owned)

    @property
    def num_rows(self) -> int:
        return sum(self._rows.values())

    @property
    def num_running(self) -> int:
        return len(self._rows)

    def has_room_for(self, delivery: Delivery) -> bool:
        """Whoever holds nothing takes anything. Live work always fits: going back, it would be overtaken."""
        is_first = not self._rows
        return is_first or delivery.job.lane == "live" or RequestState(delivery).num_rows <= self.room

    @property
    def room(self) -> int:
        """Rows that may still be taken: about one batch is held, never more."""
        return max(0, self.max_rows - self.num_rows)
