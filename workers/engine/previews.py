"""Which previews a step draws, so that they never cost other users more than a fixed part of a step."""

from __future__ import annotations

from collections.abc import Sequence

from broker.messages import SizeCosts, cost_at
from workers.engine.request import RequestState

SHARE = 0.15  # of the steps' time that may go into previews


class PreviewBudget:
    """Every step earns a share of its own time; previews are drawn as far as their measured cost has been earned.

    Earnings are kept only until they pay for a preview. So a step is held up by its share at most; where one request's
    preview costs more than that, it comes after every second or third step. Requests take turns.
    """

    def __init__(self) -> None:
        self._earned_ms = 0.0

    def choose(self, wanted: Sequence[RequestState], costs: SizeCosts, num_rows: int) -> list[RequestState]:
        """Those of `wanted` that get a preview after this step of `num_rows` rows."""
        self._earned_ms += SHARE * cost_at(costs.step_ms, num_rows)
        chosen: list[RequestState] = []
        num_pictures = 0
        for request in sorted(wanted, key=lambda request: request.num_previews):
            num_pictures += request.params.num_images
            if cost_at(costs.preview_ms, num_pictures) > self._earned_ms:
                break
            request.num_previews += 1
            chosen.append(request)
        if chosen:
            self._earned_ms = 0.0
        return chosen
