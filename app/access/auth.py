"""Who is asking, over HTTP."""

from __future__ import annotations

from starlette.datastructures import Headers

from app.access.callers import ANONYMOUS, Caller
from app.access.keys import KeyRing
from app.errors import Unauthorized


def authenticate(headers: Headers, keys: KeyRing, *, allow_anonymous: bool) -> Caller:
    """The caller by `Authorization: Bearer`. Raises Unauthorized.

    Without any keys the header means nothing: OpenAI's clients always send one. With keys a wrong one is refused even
    where anonymous callers are welcome, so that nobody goes on with less than they asked for.
    """
    given = headers.getlist("authorization")
    if not keys.is_used or (allow_anonymous and not given):
        return ANONYMOUS
    return keys.find(read_bearer(given))


def read_bearer(given: list[str]) -> str:
    if len(given) != 1:
        raise Unauthorized("an API key is needed, as in one header Authorization: Bearer fs_…")
    scheme, _, key = given[0].strip().partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthorized("Authorization: must read Bearer, a space and an API key")
    return key.strip()
