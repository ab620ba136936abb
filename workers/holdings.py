"""What this worker holds: requests it has taken and not ended yet, and the room left for more."""

from __future__ import annotations

from collections.abc import Mapping

from broker.messages import Delivery
from models.catalog import ModelSpec


class Holdings:
    """A request is owned from delivery until its end is in Redis; it takes rows until the engine is done with it."""

    def __init__(self, specs: Mapping[str, ModelSpec]) -> None:
        self._specs = specs
        self.max_rows = max(spec.max_batch_size for spec in specs.values())
        self._owned: dict[str, Delivery] = {}
        self._rows: dict[str, int] = {}

    def take(self, delivery: Delivery) -> None:
        self._owned[delivery.job.request_id] = delivery
        self._rows[delivery.job.request_id] = self._count_rows(delivery)

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
        return is_first or delivery.job.lane == "live" or self._count_rows(delivery) <= self.room

    @property
    def room(self) -> int:
        """Rows that may still be taken: about one batch is held, never more."""
        return max(0, self.max_rows - self.num_rows)

    def _count_rows(self, delivery: Delivery) -> int:
        params = delivery.job.params
        return self._specs[delivery.job.model].num_rows(params.num_images, params.guidance_scale)
