"""What routes ask for: the gateway's resources, who is asking, and the id of the request."""

from __future__ import annotations

import re
from typing import Annotated, cast

from fastapi import Depends, Header
from fastapi.requests import HTTPConnection

from app.auth import authenticate
from app.callers import Caller
from app.errors import Unauthorized, raises
from app.gateway import Gateway

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


async def get_deadline_ms(
    x_fewstep_deadline_ms: Annotated[int | None, Header(ge=1, le=3_600_000)] = None,
) -> int | None:
    """Milliseconds from now; the earlier of this and the body's `deadline_ms` counts."""
    return x_fewstep_deadline_ms


GatewayDep = Annotated[Gateway, Depends(get_gateway)]
RequestIdDep = Annotated[str, Depends(get_request_id)]
CallerDep = Annotated[Caller, Depends(identify)]
DeadlineDep = Annotated[int | None, Depends(get_deadline_ms)]
IdempotencyKeyDep = Annotated[str | None, Header(alias="Idempotency-Key")]
TraceparentDep = Annotated[str | None, Depends(get_traceparent)]
