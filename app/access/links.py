"""Picture links that need no key: signed, and good for as long as the picture is kept."""

from __future__ import annotations

from urllib.parse import urlencode

from fastapi.requests import Request

from app.errors import InvalidToken
from app.gateway import Gateway
from app.rendering import image_path

PURPOSE = "picture link"


def sign_link(gateway: Gateway, request: Request, generation_id: str, index: int) -> str:
    """An absolute URL of one picture. It begins with the public URL of the settings, or as the client's own request
    did; it ends with an asynchronous result."""
    token = gateway.signer.sign(PURPOSE, _named(generation_id, index), gateway.settings.keep_async_s)
    base = gateway.settings.public_url or str(request.base_url)
    return f"{base.rstrip('/')}{image_path(generation_id, index)}?{urlencode({'token': token})}"


def check_link(gateway: Gateway, token: str, generation_id: str, index: int) -> None:
    """Raises InvalidToken where the link was made for another picture, by somebody else, or has ended."""
    if gateway.signer.read(PURPOSE, token) != _named(generation_id, index):
        raise InvalidToken("the link was made for another picture")


def _named(generation_id: str, index: int) -> dict[str, object]:
    return {"generation": generation_id, "index": index}
