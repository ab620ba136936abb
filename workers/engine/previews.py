"""Which previews a step draws, so that they never cost other users more than a fixed part of a step."""

from __future__ import annotations

from collections.abc import Sequence

from broker.messages import SizeCosts, cost_at
from workers.engine.request import RequestState

# Of the steps' time that may go into decoding previews. What is done around it comes on top: at most 15 % in all.
SHARE = 0.115


class PreviewBudget:
    """Every step earns a share of its own time; previews are drawn as far as their measured cost has been earned.

    Requests take turns. Where a step's share doesn't pay for the next one's preview, it is saved up for that, and for
    no more: previews then come after every second or third step.
    """

    def __init__(self) -> None:
        self._earned_ms = 0.0

    def choose(self, wanted: Sequence[RequestState], costs: SizeCosts, num_rows: int) -> list[RequestState]:
        """Those of `wanted` that get a preview after this step of `num_rows` rows."""
        in_turn = sorted(wanted, key=lambda request: request.num_previews)
        share_ms = SHARE * cost_at(costs.step_ms, num_rows)
        next_ms = cost_at(costs.preview_ms, in_turn[0].params.num_images)
        self._earned_ms = min(self._earned_ms + share_ms, max(share_ms, next_ms))
        chosen: list[RequestState] = []
        num_pictures = 0
        for request in in_turn:
            num_pictures += request.params.num_images
            if cost_at(costs.preview_ms, num_pictures) > self._earned_ms:
                break
            request.num_previews += 1
            chosen.append(request)
        if chosen:
            self._earned_ms = 0.0
        return chosen
