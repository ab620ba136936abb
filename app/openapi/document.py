"""The OpenAPI document: FastAPI's, plus what it can't know.

Errors come from the notes that `app.errors.raises` leaves on routes, on their dependencies and on what these call, and
from the one table there; limits of models come from this gateway's catalog.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from http import HTTPStatus

from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute, RouteContext, iter_route_contexts
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app.access.rates import RATE_HEADERS
from app.errors import (
    BY_STATUS,
    TABLE,
    UNKNOWN,
    ClientGone,
    InvalidRequest,
    RateExceeded,
    Row,
    Unauthorized,
    UnsupportedBody,
    WrongHost,
    explained,
    noted_rows,
)
from app.http.negotiation import FORMATS
from app.openapi.declarations import GENERATION_EVENTS, IMAGE_EVENTS, REF, show_headers
from app.openapi.words import (
    ACCEPT,
    API_KEY,
    BODIES,
    CONTRADICTIONS,
    DESCRIPTION,
    EXAMPLES,
    NOT_OFFERED,
    ORIGIN,
    PARAMETERS,
    TAGS,
    Json,
)
from app.schemas import ErrorBody
from app.settings import GatewaySettings
from models.catalog import ModelSpec

# What any request can be answered with, whatever its route.
ALWAYS = (TABLE[WrongHost], BY_STATUS[408], BY_STATUS[414], BY_STATUS[431], BY_STATUS[503], UNKNOWN)


def describe(app: FastAPI, catalog: Mapping[str, ModelSpec], settings: GatewaySettings, *, has_keys: bool) -> Json:
    """The OpenAPI 3.1 document of an app that serves `catalog`."""
    needs_key = has_keys and not settings.allow_anonymous
    document = get_openapi(
        title=app.title,
        version=app.version,
        openapi_version=app.openapi_version,
        summary=app.summary,
        description=DESCRIPTION,
        routes=app.routes,
        tags=[{"name": name, "description": text} for name, text in TAGS.items()],
    )
    _add_schemas(document["components"]["schemas"])
    document["components"]["securitySchemes"] = {"key": API_KEY}
    for route, operation in operations(app, document):
        _complete(operation, route)
        if TABLE[Unauthorized].code in json.dumps(operation["responses"].get("401")):
            operation["security"] = [{"key": []}] if needs_key else [{}, {"key": []}]
    _complete_bodies(document["components"]["schemas"], catalog, settings)
    return document


def operations(app: FastAPI, document: Json) -> Iterator[tuple[RouteContext, Json]]:
    """Each route beside what the document says of it."""
    for route in iter_route_contexts(app.routes):
        if isinstance(route.original_route, APIRoute) and route.include_in_schema:
            for method in route.methods or ():
                yield route, document["paths"][route.path_format][method.lower()]


def _add_schemas(schemas: Json) -> None:
    """Those that no route names by itself: of errors, and of events."""
    models: set[type[BaseModel]] = {ErrorBody, *GENERATION_EVENTS.values(), *IMAGE_EVENTS.values()}
    inputs = [(model, "serialization") for model in sorted(models, key=lambda model: model.__name__)]
    _, definitions = models_json_schema(inputs, ref_template=REF + "{model}")  # type: ignore[arg-type]
    schemas.update(definitions["$defs"])
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)


def _complete_bodies(schemas: Json, catalog: Mapping[str, ModelSpec], settings: GatewaySettings) -> None:
    """Meanings and limits of the requests' fields, and what can't stand together."""
    for name, fields in BODIES.items():
        for field, schema in schemas[name]["properties"].items():
            schema.setdefault("description", fields.get(field, ""))
        narrow(schemas[name], catalog)
    narrow_loras(schemas["LoraChoice"], catalog)
    token = schemas["LiveTokenRequest"]["properties"]
    token["origin"]["pattern"] = ORIGIN
    _first_choice(token["ttl_s"])["maximum"] = settings.live_token_max_ttl_s
    schemas["OpenAIImageRequest"]["allOf"] = [{"not": contradiction} for contradiction in CONTRADICTIONS]


def _complete(operation: Json, route: RouteContext) -> None:
    parameters = operation.get("parameters", [])
    operation["parameters"] = [parameter for parameter in parameters if parameter["name"] != "accept"]
    if len(operation["parameters"]) < len(parameters):
        operation["description"] += ACCEPT
    for parameter in operation["parameters"]:
        _complete_parameter(parameter)
    if operation["operationId"] in EXAMPLES:
        operation["requestBody"]["content"]["application/json"]["examples"] = EXAMPLES[operation["operationId"]]
    responses = operation["responses"]
    is_checked = responses.pop("422", None) is not None
    rows = _find_rows(route, operation, is_checked)
    for status, group in _by_status(rows).items():
        _add_errors(responses.setdefault(str(status), {}), status, group)
    rates = RATE_HEADERS if explained(RateExceeded) in rows else ()
    for response in responses.values():
        response.setdefault("headers", {}).update(show_headers("X-Request-Id", sometimes=rates))
        for content in response.get("content", {}).values():
            content.pop("itemSchema", None)
    operation["responses"] = dict(sorted(responses.items()))


def _complete_parameter(parameter: Json) -> None:
    known = PARAMETERS.get(parameter["name"], {})
    parameter.update(known)
    schema = parameter["schema"]
    choices = [choice for choice in schema.pop("anyOf", ()) if choice != {"type": "null"}]
    if len(choices) == 1:
        schema.update(choices[0])


def _find_rows(route: RouteContext, operation: Json, is_checked: bool) -> set[Row]:
    """Everything that a request of this route can be refused with."""
    rows = {*ALWAYS, *noted_rows(route.endpoint), *_rows_of_dependencies(route.dependant)}
    if "requestBody" in operation:
        rows |= {TABLE[InvalidRequest], explained(UnsupportedBody), BY_STATUS[413]}
    elif is_checked:
        rows |= {replace(TABLE[InvalidRequest], more_codes=())}
    return rows - {TABLE[ClientGone]}


def _rows_of_dependencies(dependant: Dependant) -> Iterator[Row]:
    for dependency in dependant.dependencies:
        yield from noted_rows(dependency.call)
        yield from _rows_of_dependencies(dependency)


def _by_status(rows: Iterable[Row]) -> dict[int, list[Row]]:
    grouped = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row.status, row.code, row.meaning)):
        grouped[row.status].append(row)
    return grouped


def _add_errors(response: Json, status: int, rows: list[Row]) -> None:
    """Beside what the route itself may answer with that status."""
    codes = list(dict.fromkeys(code for row in rows for code in row.codes))
    error = {"properties": {"error": {"properties": {"code": {"enum": codes}}}}}
    schema: Json = {"allOf": [{"$ref": REF + "ErrorBody"}, error]}
    content = response.setdefault("content", {}).setdefault("application/json", {})
    content["schema"] = {"anyOf": [content["schema"], schema]} if "schema" in content else schema
    response["description"] = " ".join(filter(None, (response.get("description"), _explain(status, rows))))
    response.setdefault("headers", {}).update(_error_headers(rows))


def _explain(status: int, rows: list[Row]) -> str:
    texts = [f"{list_codes(row)}: {row.meaning}." for row in rows]
    return " ".join([f"{HTTPStatus(status).phrase}.", *texts])


def list_codes(row: Row) -> str:
    return ", ".join(f"`{code}`" for code in row.codes)


def _error_headers(rows: list[Row]) -> Json:
    waits = ("Retry-After", "retry-after-ms") if any(row.says_when for row in rows) else ()
    retries = ("x-should-retry",) if any(row.should_retry is not None for row in rows) else ()
    realms = ("WWW-Authenticate",) if rows[0].status == 401 else ()
    return show_headers(*realms, sometimes=(*waits, *retries))


# The limits of this gateway's models


def narrow(schema: Json, catalog: Mapping[str, ModelSpec]) -> None:
    """Writes what the models of the catalog take together into a request's schema; each may take less."""
    specs = list(catalog.values())
    sizes = sorted({size for spec in specs for size in spec.sizes})
    num_images = max(spec.max_num_images for spec in specs)
    steps, guidance = [spec.num_inference_steps for spec in specs], [spec.guidance_scale for spec in specs]
    max_chars = {"maxLength": max(spec.max_prompt_chars for spec in specs)}
    limits: dict[str, Json] = {
        "prompt": {**max_chars, "pattern": r"\S"},
        "negative_prompt": max_chars,
        "model": {"enum": list(catalog)},
        "width": {"enum": sorted({width for width, _ in sizes})},
        "height": {"enum": sorted({height for _, height in sizes})},
        "size": {"enum": ["auto", *(f"{width}x{height}" for width, height in sizes)]},
        "num_inference_steps": {"minimum": min(one.min for one in steps), "maximum": max(one.max for one in steps)},
        "guidance_scale": {"minimum": min(one.min for one in guidance), "maximum": max(one.max for one in guidance)},
        "scheduler": {"enum": sorted({name for spec in specs for name in spec.schedulers})},
        "num_images": {"maximum": num_images},
        "n": {"maximum": min(10, num_images)},
        "decoder": {"enum": ["full", "auto", *(["tiny"] if any(spec.tiny_vae for spec in specs) else [])]},
        "loras": {"maxItems": min(8, max(len(spec.loras) for spec in specs))},
        "background": {"enum": ["auto", "opaque"]},
        "output_format": {"enum": list(FORMATS)},
    }
    for name, limit in limits.items():
        if name in schema["properties"]:
            _first_choice(schema["properties"][name]).update(limit)
    for name in NOT_OFFERED & schema["properties"].keys():
        schema["properties"][name] = {"type": "null", "description": "belongs to formats that are not offered"}


def narrow_loras(schema: Json, catalog: Mapping[str, ModelSpec]) -> None:
    """The same for one LoRA of a request, where any model has some."""
    loras = {name: lora for spec in catalog.values() for name, lora in spec.loras.items()}
    if loras:
        weights = [lora.weight for lora in loras.values()]
        limits = {"minimum": min(one.min for one in weights), "maximum": max(one.max for one in weights)}
        schema["properties"]["name"]["enum"] = sorted(loras)
        _first_choice(schema["properties"]["weight"]).update(limits)


def _first_choice(schema: Json) -> Json:
    """The part of an optional field's schema that isn't null."""
    choice: Json = schema["anyOf"][0] if "anyOf" in schema else schema
    return choice
