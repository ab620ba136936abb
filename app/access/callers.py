"""Who is asking, and what they may."""

from __future__ import annotations

from dataclasses import dataclass

from broker.messages import Lane


@dataclass(frozen=True, slots=True)
class Share:
    """The part of its key's rate that a live token may use; tokens with one `name` use it together."""

    name: str
    max_images_per_minute: int


@dataclass(frozen=True, slots=True)
class Caller:
    """One API key, or everybody who comes without one where that is allowed.

    `owner` names the line that its requests wait in and the generations that it may read back; `weight` is its share
    of a lane beside other callers. `models` None means all. Rates are per minute, None means unlimited.
    """

    owner: str
    weight: int = 1
    models: frozenset[str] | None = None
    lanes: frozenset[Lane] = frozenset({"live", "api"})
    max_requests_per_minute: int | None = None
    max_images_per_minute: int | None = None
    share: Share | None = None


ANONYMOUS = Caller("anonymous")
