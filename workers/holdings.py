"""What this worker holds: requests it has taken and not ended yet, and the room left for more."""

from __future__ import annotations

from collections.abc import Mapping

from broker.messages import Delivery
from models.catalog import ModelSpec


class Holdings:
    """A request is owned from delivery until its end is in Redis; it takes rows until the engine is done with it.

    `max_rows` is how many rows of each warm model are held: about one batch. What waits beyond it waits in the queue,
    where its order can still change.
    """

    def __init__(self, specs: Mapping[str, ModelSpec]) -> None:
        self._specs = specs
        self.max_rows: dict[str, int] = {}
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
        """Any room takes one request, however wide: handed back, it would come again and never find more. Live work
        always fits: going back, it would be overtaken."""
        return delivery.job.lane == "live" or self.room(delivery.job.model) > 0

    def room(self, model: str) -> int:
        """Rows of `model` that may still be taken; none while it isn't warm."""
        held = (rows for request_id, rows in self._rows.items() if self._owned[request_id].job.model == model)
        return max(0, self.max_rows.get(model, 0) - sum(held))

    def _count_rows(self, delivery: Delivery) -> int:
        params = delivery.job.params
        return self._specs[delivery.job.model].num_rows(params.num_images, params.guidance_scale)
