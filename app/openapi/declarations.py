"""What routes declare of their answers: headers, pictures, streams of events."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from pydantic import BaseModel

from app.http.negotiation import FORMATS
from app.openapi.words import HEADERS, TEXT, Json
from app.schemas import CompletedImage, Generation, PartialImage, PreviewData, StreamError

REF = "#/components/schemas/"
RESULT_HEADERS = (
    "Server-Timing",
    "X-Fewstep-Seed",
    "X-Fewstep-Model",
    "X-Fewstep-Model-Revision",
    "X-Fewstep-Generation",
)
SHARING_HEADERS = ("Cache-Status", "Idempotent-Replayed")
MODEL_HEADERS = ("Deprecation", "Sunset")


def show_headers(*always: str, sometimes: Iterable[str] = ()) -> Json:
    """The response headers of those names."""
    return {name: _header(name, name in always) for name in (*always, *sometimes)}


def _header(name: str, is_required: bool) -> Json:
    description, schema = HEADERS[name]
    return {"description": description, "required": is_required, "schema": dict(schema)}


def image_types() -> Json:
    """The content of an answer that is the bytes of a picture."""
    return {f"image/{format}": {"schema": {"type": "string", "format": "binary"}} for format in FORMATS}


def event_stream(events: Mapping[str, type[BaseModel]], *, has_ids: bool) -> Json:
    """The content of a stream of server-sent events. In OpenAPI 3.1 its schema is that of each event."""
    by_model: dict[type[BaseModel], list[str]] = defaultdict(list)
    for name, model in events.items():
        by_model[model].append(name)
    return {"text/event-stream": {"schema": {"oneOf": [_event(*pair, has_ids) for pair in by_model.items()]}}}


def _event(model: type[BaseModel], names: list[str], has_id: bool) -> Json:
    data = {**TEXT, "contentMediaType": "application/json", "contentSchema": {"$ref": REF + model.__name__}}
    event_id = {"id": {**TEXT, "pattern": "^[0-9]+$", "description": "for `Last-Event-ID`"}} if has_id else {}
    return {
        "type": "object",
        "required": ["event", "data", *event_id],
        "properties": {"event": {**TEXT, "enum": names}, "data": data, **event_id},
    }


GENERATION_EVENTS: dict[str, type[BaseModel]] = {
    **dict.fromkeys(("queued", "started"), Generation),
    "preview": PreviewData,
    **dict.fromkeys(("completed", "failed", "cancelled", "superseded", "expired"), Generation),
}
IMAGE_EVENTS: dict[str, type[BaseModel]] = {
    "image_generation.partial_image": PartialImage,
    "image_generation.completed": CompletedImage,
    "error": StreamError,
}
