"""`WS /v1/live`: who may open a live socket. The session itself is `app.live_session`."""

from __future__ import annotations

import logging

from fastapi import APIRouter
from fastapi.websockets import WebSocket

from app.dependencies import CallerDep, GatewayDep, RequestIdDep
from app.gateway import Gateway
from app.live_protocol import SUBPROTOCOL, CloseCode, check_origin, reconnect_reason
from app.live_session import LiveSession

log = logging.getLogger(__name__)

router = APIRouter(tags=["live"])


@router.websocket("/v1/live")
async def live(websocket: WebSocket, gateway: GatewayDep, caller: CallerDep, request_id: RequestIdDep) -> None:
    if not is_welcome(websocket, gateway):
        await websocket.close(CloseCode.NORMAL)  # before accept: HTTP 403
        return
    await websocket.accept(SUBPROTOCOL if websocket.scope["subprotocols"] else None)
    if len(gateway.live_sockets) >= gateway.settings.max_live_connections:
        gateway.metrics.rejected.labels("live_connections").inc()
        await websocket.close(CloseCode.TRY_LATER, reconnect_reason(gateway.settings.live_reconnect_in_ms))
        return
    await LiveSession(websocket, gateway, request_id, caller).run()


def is_welcome(websocket: WebSocket, gateway: Gateway) -> bool:
    """Another site's page isn't, nor a client of another protocol. A client that names no protocol is."""
    origin = websocket.headers.get("origin")
    if not check_origin(origin, websocket.headers.get("host", ""), gateway.settings.allowed_origins):
        log.warning("refused a live socket from the origin %.200r; see FEWSTEP_ALLOWED_ORIGINS", origin)
        gateway.metrics.rejected.labels("origin").inc()
        return False
    offered = websocket.scope["subprotocols"]
    return not offered or SUBPROTOCOL in offered
