"""One gateway's resources, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from app.admission import Admission, Fleet
from app.keys import KeyRing
from app.metrics import Metrics
from app.replies import Replies
from app.settings import GatewaySettings
from app.signing import Signer
from broker.redis_broker import RedisBroker
from models.catalog import ModelSpec


class LiveSocket(Protocol):
    """An open live session, as the server's shutdown sees it."""

    async def go_away(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Gateway:
    """Alive from startup to shutdown; routes reach it by `app.dependencies`."""

    settings: GatewaySettings
    catalog: Mapping[str, ModelSpec]
    broker: RedisBroker
    replies: Replies
    fleet: Fleet
    admission: Admission
    metrics: Metrics
    keys: KeyRing
    signer: Signer
    live_sockets: set[LiveSocket] = field(default_factory=set)
