"""One gateway's resources, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from app.access.callers import Caller
from app.access.keys import KeyRing
from app.access.signing import Signer
from app.admission import Admission
from app.catalog import ServedCatalog
from app.fleet import Fleet, draw_alike
from app.metrics import Metrics
from app.replies import Replies
from app.settings import GatewaySettings
from broker.redis_broker import RedisBroker
from models.catalog import ModelSpec


class LiveSocket(Protocol):
    """An open live session, as the server's shutdown sees it."""

    async def go_away(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Gateway:
    """Alive from startup to shutdown; routes reach it by `app.dependencies`."""

    settings: GatewaySettings
    catalog: ServedCatalog
    broker: RedisBroker
    replies: Replies
    fleet: Fleet
    admission: Admission
    metrics: Metrics
    keys: KeyRing
    signer: Signer
    live_sockets: set[LiveSocket] = field(default_factory=set)

    def find_model(self, name: str | None, caller: Caller) -> ModelSpec:
        """The caller's default where it names none. Raises UnknownModelError or Forbidden."""
        return self.admission.find_model(name or self.default_model(caller), caller)

    async def cache_s(self, spec: ModelSpec) -> float:
        """For how long a picture of this entry may be shared. Raises BrokerUnavailable."""
        is_on = self.settings.cache_s > 0
        return self.settings.cache_s if is_on and draw_alike(await self.fleet.workers(), spec) else 0

    def default_model(self, caller: Caller) -> str:
        return self.admission.default_model(caller, self.settings.default_model)
