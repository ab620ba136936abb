"""`WS /v1/live` and the tokens that open it to a page. The session itself is `app.live.session`."""

from __future__ import annotations

import logging

from fastapi import APIRouter
from fastapi.responses import Response
from fastapi.websockets import WebSocket

from app.admission import Admission
from app.dependencies import CallerDep, GatewayDep, RequestIdDep
from app.errors import Forbidden, Unauthorized, raises
from app.gateway import Gateway
from app.http.strict_json import JsonRoute
from app.live.access import Door, make_token
from app.live.protocol import SUBPROTOCOL, CloseCode, reconnect_reason
from app.live.session import LiveSession
from app.openapi.declarations import show_headers
from app.schemas import LiveTokenAnswer, LiveTokenRequest

log = logging.getLogger(__name__)

router = APIRouter(route_class=JsonRoute, tags=["live"])


@router.post("/v1/live/tokens", responses={200: {"headers": show_headers("Cache-Control")}})
@raises(Admission.find_model, Unauthorized, Forbidden)
async def create_live_token(
    body: LiveTokenRequest, response: Response, gateway: GatewayDep, caller: CallerDep
) -> LiveTokenAnswer:
    """A short-lived token that a backend hands to its page, bound to the key, a model and the page's origin."""
    response.headers["Cache-Control"] = "no-store"
    return make_token(body, caller, gateway)


@router.websocket("/v1/live")
async def live(websocket: WebSocket, gateway: GatewayDep, request_id: RequestIdDep) -> None:
    door = Door(websocket, gateway)
    if not is_welcome(websocket, door, gateway):
        await websocket.close(CloseCode.NORMAL)  # before accept: HTTP 403
        return
    await websocket.accept(SUBPROTOCOL if websocket.scope["subprotocols"] else None)
    if len(gateway.live_sockets) >= gateway.settings.max_live_connections:
        gateway.metrics.rejected.labels("live_connections").inc()
        await websocket.close(CloseCode.TRY_LATER, reconnect_reason(gateway.settings.live_reconnect_in_ms))
        return
    await LiveSession(websocket, gateway, request_id, door).run()


def is_welcome(websocket: WebSocket, door: Door, gateway: Gateway) -> bool:
    """Another site's page isn't, nor a client of another protocol. A client that names no protocol is."""
    if door.is_foreign:
        origin = websocket.headers.get("origin")
        log.warning("refused a live socket from the origin %.200r; see FEWSTEP_ALLOWED_ORIGINS", origin)
        gateway.metrics.rejected.labels("origin").inc()
        return False
    offered = websocket.scope["subprotocols"]
    return not offered or SUBPROTOCOL in offered
