"""Who may use a live socket, until when, and how fast.

A backend with an API key gets a short-lived token for each of its pages; the page opens its socket with that. Keys
themselves are for programs: no page should ever hold one.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from pydantic import BaseModel
from starlette.websockets import WebSocket

from app.access.callers import ANONYMOUS, Caller, Share
from app.admission import check_lane
from app.errors import GatewayError, InvalidToken, Unauthorized, invalid, render
from app.gateway import Gateway
from app.live.protocol import AUTH_PREFIX, SUBPROTOCOL, CloseCode, SessionEnd, check_origin
from app.schemas import LiveTokenAnswer, LiveTokenRequest
from models.catalog import UnknownModelError

PURPOSE = "live"
DEFAULT_TTL_S = 300
KEY_PREFIX = "fs_"
# What a URL carries ends up in logs, histories and Referer headers.
FORBIDDEN_PARAMETERS = frozenset({"token", "key", "api_key"})
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


class LiveToken(BaseModel):
    """What a token says, readable by whoever holds it. `key` is the id of the API key that it lives on."""

    key: str
    model: str
    origin: str
    share: str
    ends_at: float
    max_messages_per_s: float | None
    max_images_per_minute: int | None


@dataclass(frozen=True, slots=True)
class Access:
    """A caller, let in. `token` is what it came with, None for a key and for anonymous callers."""

    caller: Caller
    token: LiveToken | None = None

    @property
    def seconds_left(self) -> float | None:
        """Until the token ends; None where nothing ends by itself."""
        return max(0.0, self.token.ends_at - time.time()) if self.token else None

    def limit_messages(self, most_per_s: float) -> float:
        """Messages per second: the setting's, or less where the token says so."""
        own = self.token.max_messages_per_s if self.token else None
        return most_per_s if own is None else min(own, most_per_s)


# Making tokens


def make_token(wish: LiveTokenRequest, caller: Caller, gateway: Gateway) -> LiveTokenAnswer:
    """Raises Unauthorized, Forbidden or InvalidRequest."""
    if caller is ANONYMOUS:
        raise Unauthorized("live tokens are made with an API key")
    check_lane("live", caller)
    ttl_s = _choose_ttl(wish.ttl_s, gateway.settings.live_token_max_ttl_s)
    token = LiveToken(
        key=caller.owner,
        model=gateway.find_model(wish.model, caller).name,
        origin=_check_origin(wish.origin),
        share=_name_share(wish.user),
        ends_at=time.time() + ttl_s,
        max_messages_per_s=wish.max_messages_per_s,
        max_images_per_minute=wish.max_images_per_minute,
    )
    text = gateway.signer.sign(PURPOSE, token.model_dump(), ttl_s)
    return LiveTokenAnswer(
        token=text,
        expires_at=token.ends_at,
        expires_in_s=ttl_s,
        model=token.model,
        origin=token.origin,
        subprotocols=[SUBPROTOCOL, AUTH_PREFIX + text],
    )


def _choose_ttl(ttl_s: int | None, longest_s: int) -> int:
    if ttl_s is not None and ttl_s > longest_s:
        raise invalid("ttl_s", ttl_s, f"a token may live for 1 to {longest_s} seconds")
    return min(DEFAULT_TTL_S, longest_s) if ttl_s is None else ttl_s


def _check_origin(text: str) -> str:
    origin = normal_origin(text)
    if origin is None:
        raise invalid(
            "origin", text, "it must be the page's origin, as in https://example.org or http://localhost:3000"
        )
    return origin


def normal_origin(text: str) -> str | None:
    """As browsers write it: lower case, no default port. None where it is no origin of a page."""
    try:
        parts = urlsplit(text.strip().lower())
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    is_bare = parts.path in ("", "/") and not parts.query and not parts.fragment and "@" not in parts.netloc
    if parts.scheme not in _DEFAULT_PORTS or not host or not is_bare or "*" in host or port == 0:
        return None
    return f"{parts.scheme}://{parts.netloc.removesuffix(_DEFAULT_PORTS[parts.scheme])}"


def _name_share(user: str | None) -> str:
    """Tokens of one user share its rate; others have a share of their own each."""
    if user is None:
        return secrets.token_hex(8)
    return hashlib.sha256(user.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# Letting in


class Door:
    """Who may come in by one socket. Whatever is refused raises SessionEnd with the close code 4401."""

    def __init__(self, websocket: WebSocket, gateway: Gateway) -> None:
        self._gateway = gateway
        self._query = websocket.query_params
        self._offered: list[str] = websocket.scope.get("subprotocols", [])
        self._origin = websocket.headers.get("origin")
        host, allowed = websocket.headers.get("host", ""), gateway.settings.allowed_origins
        self._is_welcome_origin = check_origin(self._origin, host, allowed)

    @property
    def is_foreign(self) -> bool:
        """Another site's page, and no token could open the door to it."""
        return not self._is_welcome_origin and not self._gateway.keys.is_used

    def open(self) -> Access | None:
        """By what the handshake carries; None where the first message has to say who it is."""
        if named := FORBIDDEN_PARAMETERS.intersection(self._query):
            raise self._refuse(Unauthorized(f"{min(named)} doesn't belong in the URL: see subprotocol {AUTH_PREFIX}…"))
        credentials = [name.removeprefix(AUTH_PREFIX) for name in self._offered if name.startswith(AUTH_PREFIX)]
        if len(credentials) > 1:
            raise self._refuse(Unauthorized(f"more than one subprotocol {AUTH_PREFIX}…"))
        if credentials:
            return self.admit(credentials[0])
        is_open = self._gateway.settings.allow_anonymous or not self._gateway.keys.is_used
        return Access(ANONYMOUS) if is_open and self._is_welcome_origin else None

    def admit(self, credential: str) -> Access:
        """By an API key or a live token."""
        try:
            return self._find_access(credential)
        except (GatewayError, UnknownModelError) as error:
            raise self._refuse(error) from error

    def confirm(self, access: Access) -> Access:
        """Again, now: the token may have ended, the key may have been revoked or changed."""
        try:
            if access.token is not None:
                return self._enter_with(access.token)
            if access.caller is ANONYMOUS:
                return access
            return self._enter_as(self._gateway.keys.get(access.caller.owner))
        except (GatewayError, UnknownModelError) as error:
            raise self._refuse(error) from error

    def nobody(self, why: str) -> SessionEnd:
        return self._refuse(Unauthorized(why))

    def _find_access(self, credential: str) -> Access:
        if not self._gateway.keys.is_used:
            return Access(ANONYMOUS)
        if not credential.startswith(KEY_PREFIX):
            return self._enter_with(LiveToken.model_validate(self._gateway.signer.read(PURPOSE, credential)))
        return self._enter_as(self._gateway.keys.find(credential))

    def _enter_as(self, caller: Caller) -> Access:
        check_lane("live", caller)
        if not self._is_welcome_origin:
            raise Unauthorized("a page of this origin needs a live token, see POST /v1/live/tokens")
        return Access(caller)

    def _enter_with(self, token: LiveToken) -> Access:
        if time.time() >= token.ends_at:
            raise InvalidToken("the live token has expired", code="token_expired")
        if self._origin is None or normal_origin(self._origin) != token.origin:
            raise InvalidToken(f"the live token is for pages of {token.origin}")
        caller = self._gateway.keys.get(token.key)
        check_lane("live", caller)
        self._gateway.admission.find_model(token.model, caller)
        share = Share(token.share, token.max_images_per_minute) if token.max_images_per_minute else None
        return Access(replace(caller, models=frozenset({token.model}), share=share), token)

    def _refuse(self, error: GatewayError | UnknownModelError) -> SessionEnd:
        self._gateway.metrics.rejected.labels(render(error).code).inc()
        return SessionEnd(CloseCode.AUTH, str(error))
