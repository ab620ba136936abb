"""When one generation answers several requests: idempotency keys, and the cache of results."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace

from pydantic import BaseModel

from app.errors import invalid
from broker.messages import Job
from broker.terms import Origin, Terms
from models.catalog import ModelSpec

MAX_KEY_CHARS = 255


def with_idempotency_key(terms: Terms, key: str | None, body: BaseModel, job: Job) -> Terms:
    """Requests with the same key are one if they ask for the same: same body, `null` being the same as absent, and the
    same format by whichever header. Raises InvalidRequest."""
    if key is None:
        return terms
    if not 1 <= len(key) <= MAX_KEY_CHARS or not key.isascii() or not key.isprintable():
        raise invalid("Idempotency-Key", key, f"1 to {MAX_KEY_CHARS} printable ASCII characters")
    asked = [type(body).__name__, body.model_dump(mode="json", exclude_none=True), job.params.output_format]
    return replace(terms, idempotency_key=digest(key), fingerprint=digest(asked))


def cached_for(job: Job, spec: ModelSpec, cache_s: float) -> Terms:
    """Shares the result with whoever asks for the very same picture with the same key: model and its revision, all
    parameters, the seed. 0 turns it off."""
    if cache_s == 0:
        return Terms()
    what = [job.owner, spec.name, spec.public_revision, asdict(job.params)]
    return Terms(cache_key=digest(what), cache_s=cache_s)


def digest(value: object) -> str:
    """SHA-256 of plain JSON, lone surrogates included."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sharing_headers(origin: Origin, terms: Terms) -> dict[str, str]:
    """`Cache-Status` (RFC 9211) for whatever may be cached, and whether an idempotency key was used before."""
    match origin:
        case "repeated":
            return {"Idempotent-Replayed": "true"}
        case "cached":
            return {"Cache-Status": "fewstep; hit"}
        case "joined":
            return {"Cache-Status": "fewstep; fwd=miss; collapsed"}
        case "new":
            return {"Cache-Status": "fewstep; fwd=miss" if terms.cache_key else "fewstep; fwd=bypass"}
