"""Signed tokens: what a stranger carries for us and can't change, until it expires.

A token is bound to one purpose: one made for a live socket opens no picture link. It is signed, not encrypted: whoever
holds it can read the payload, so no secret belongs in it.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

from itsdangerous import BadData, URLSafeSerializer

from app.errors import InvalidToken

MIN_SECRET_BYTES = 32
_SIGNER = {"key_derivation": "hmac", "digest_method": hashlib.sha256}


class Signer:
    """Signs with HMAC-SHA256 under a key derived from `secret` and the purpose. All gateways need the same secret.

    Expiry goes by the clock of the host, so the clocks of several gateways should agree to a second.
    """

    def __init__(self, secret: str | bytes) -> None:
        self._secret = secret.encode() if isinstance(secret, str) else secret
        if len(self._secret) < MIN_SECRET_BYTES:
            raise ValueError(f"a secret has at least {MIN_SECRET_BYTES} bytes, this one has {len(self._secret)}")

    def sign(self, purpose: str, payload: dict[str, Any], ttl_s: float) -> str:
        """A token that is safe in URLs and headers; `read` gives `payload`, plain JSON, back for `ttl_s` seconds."""
        return str(self._serializer(purpose).dumps({"until": time.time() + ttl_s, "payload": payload}))

    def read(self, purpose: str, token: str) -> dict[str, Any]:
        """What was signed for this purpose. Raises InvalidToken."""
        try:
            signed: dict[str, Any] = self._serializer(purpose).loads(token)
        except (BadData, UnicodeError) as error:
            raise InvalidToken(f"the token is not a valid {purpose} token", code="invalid_token") from error
        if time.time() >= signed["until"]:
            raise InvalidToken(f"the {purpose} token has expired", code="token_expired")
        payload: dict[str, Any] = signed["payload"]
        return payload

    def _serializer(self, purpose: str) -> URLSafeSerializer:
        return URLSafeSerializer(self._secret, salt=f"fewstep {purpose}", signer_kwargs=_SIGNER)
