"""When one generation answers several requests: idempotency keys, and the cache of results."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, replace

from pydantic import BaseModel

from app.errors import invalid
from app.schemas import GenerationRequest, OpenAIImageRequest
from broker.messages import Job
from broker.terms import Origin, Terms
from models.catalog import ModelSpec

MAX_KEY_CHARS = 255
DELIVERY_S = 5.0  # should the events get lost on their way, they are fetched from the log


def choose_terms(
    body: GenerationRequest | OpenAIImageRequest,
    job: Job,
    spec: ModelSpec,
    *,
    idempotency_key: str | None,
    is_promised: bool,
    cache_s: float,
) -> Terms:
    """A result is promised to whoever said that they would come for it; else only until it is surely delivered.

    A picture with a seed is shared for `cache_s`, and a key makes requests for the same one request. Raises
    InvalidRequest.
    """
    terms = Terms(promise_s=math.inf if is_promised else DELIVERY_S)
    if cache_s > 0 and body.seed is not None and body.cache is not False:
        terms = replace(terms, cache_key=name_picture(job, spec), cache_s=cache_s)
    if idempotency_key is not None:
        check_key(idempotency_key)
        terms = replace(terms, idempotency_key=digest(idempotency_key), fingerprint=name_request(body, job))
    return terms


def keep_for_others(job: Job, terms: Terms) -> Job:
    """A result that another request may ask for outlives its end by as long as that takes to fetch it."""
    is_shared = terms.cache_key is not None or terms.idempotency_key is not None
    return replace(job, keep_s=max(job.keep_s, DELIVERY_S)) if is_shared else job


def check_key(key: str) -> None:
    if not 1 <= len(key) <= MAX_KEY_CHARS or not key.isascii() or not key.isprintable():
        raise invalid("Idempotency-Key", key, f"1 to {MAX_KEY_CHARS} printable ASCII characters")


def name_picture(job: Job, spec: ModelSpec) -> str:
    """The same for the very same picture of one caller: all that the catalog says of the model and its LoRAs, all
    parameters, the seed."""
    return digest([job.owner, spec.fingerprint, asdict(job.params)])


def name_request(body: BaseModel, job: Job) -> str:
    """The same for the same body, `null` being as good as absent, and the same format by whichever header."""
    return digest([type(body).__name__, body.model_dump(mode="json", exclude_none=True), job.params.output_format])


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
