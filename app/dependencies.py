"""What routes ask for: the gateway's resources, who is asking, and what the headers say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Header
from fastapi.requests import HTTPConnection

from app.access.auth import authenticate
from app.access.callers import Caller
from app.errors import Unauthorized, raises
from app.gateway import Gateway
from app.parameters import earliest, find_warnings
from broker.messages import Job, SamplingParams
from models.catalog import ModelSpec

_TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


async def get_gateway(connection: HTTPConnection) -> Gateway:
    return cast(Gateway, connection.state.gateway)


async def get_request_id(connection: HTTPConnection) -> str:
    return cast(str, connection.state.request_id)


@raises(Unauthorized)
async def identify(connection: HTTPConnection) -> Caller:
    """Raises Unauthorized."""
    gateway = await get_gateway(connection)
    return authenticate(connection.headers, gateway.keys, allow_anonymous=gateway.settings.allow_anonymous)


async def get_traceparent(traceparent: Annotated[str | None, Header()] = None) -> str | None:
    """W3C trace context, passed on to the worker when it is well formed."""
    return traceparent if traceparent and _TRACEPARENT.fullmatch(traceparent) else None


GatewayDep = Annotated[Gateway, Depends(get_gateway)]
RequestIdDep = Annotated[str, Depends(get_request_id)]
CallerDep = Annotated[Caller, Depends(identify)]


@dataclass(frozen=True, slots=True)
class Call:
    """A request for pictures, as far as its body doesn't say: who asks, and what its headers add."""

    gateway: Gateway
    caller: Caller
    request_id: str
    idempotency_key: str | None
    deadline_ms: int | None
    traceparent: str | None

    def make_job(
        self,
        spec: ModelSpec,
        params: SamplingParams,
        *,
        is_promised: bool,
        deadline_ms: int | None,
        user: str | None = None,
    ) -> Job:
        """Its result is kept as long as an asynchronous one if it `is_promised`. The earlier deadline counts."""
        settings = self.gateway.settings
        return Job(
            request_id=self.request_id,
            model=spec.name,
            params=params,
            lane="api",
            owner=self.caller.owner,
            gateway_id=self.gateway.replies.gateway_id,
            keep_s=settings.keep_async_s if is_promised else settings.keep_sync_s,
            deadline_ms=earliest(deadline_ms, self.deadline_ms),
            warnings=find_warnings(params, spec),
            traceparent=self.traceparent,
            user=user,
        )


async def read_call(
    gateway: GatewayDep,
    caller: CallerDep,
    request_id: RequestIdDep,
    traceparent: Annotated[str | None, Depends(get_traceparent)],
    idempotency_key: Annotated[str | None, Header(alias="Idempotency-Key")] = None,
    x_fewstep_deadline_ms: Annotated[int | None, Header(ge=1, le=3_600_000)] = None,
) -> Call:
    return Call(gateway, caller, request_id, idempotency_key, x_fewstep_deadline_ms, traceparent)


CallDep = Annotated[Call, Depends(read_call)]
