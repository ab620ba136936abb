"""Every exception that leaves a route becomes an answer in the one error shape."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import Route

from app.errors import (
    ErrorAnswer,
    GatewayError,
    GenerationFailed,
    InvalidRequest,
    UnsupportedBody,
    http_error,
    invalid_from,
    render,
    shorten,
)
from app.http.middleware import add_headers
from app.metrics import Metrics
from broker.errors import BrokerError
from models.catalog import CatalogError

log = logging.getLogger(__name__)

_DETAILS = {
    404: "there is nothing at this path",
    405: "this path has no such method",
    413: "the body is larger than the server takes",
}


def install_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Hands every kind of exception to the table in `app.errors`; refusals are counted by their code."""

    def respond(request: Request, answer: ErrorAnswer) -> Response:
        if answer.status != 404 and request.method == "POST":
            metrics.rejected.labels(answer.code).inc()
        return JSONResponse(answer.body, answer.status, answer.headers)

    async def answer_domain_error(request: Request, error: Exception) -> Response:
        return respond(request, render(error))

    async def answer_ending(request: Request, error: Exception) -> Response:
        """Not a refusal: the request was in the queue, and its end is counted among the outcomes."""
        del request
        answer = render(error)
        return JSONResponse(answer.body, answer.status, answer.headers)

    async def answer_validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return respond(request, render(explain_validation(request, error)))

    async def answer_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 204:
            return Response(status_code=204)
        is_own_text = error.status_code == 404 and error.detail != "Not Found"
        detail = error.detail if is_own_text else _DETAILS.get(error.status_code, error.detail)
        response = respond(request, http_error(error.status_code, detail))
        response.headers.update(error.headers or {})
        if error.status_code == 405:
            response.headers["Allow"] = ", ".join(sorted(find_methods(request)))
        return response

    async def answer_unexpected(request: Request, error: Exception) -> Response:
        log.error("request %s failed", request.state.request_id, exc_info=error)
        response = respond(request, render(error))
        add_headers(MutableHeaders(raw=response.raw_headers), request.state.request_id)
        return response

    app.add_exception_handler(GenerationFailed, answer_ending)
    for kind in (GatewayError, BrokerError, CatalogError):
        app.add_exception_handler(kind, answer_domain_error)
    app.add_exception_handler(RequestValidationError, answer_validation_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(Exception, answer_unexpected)


def find_methods(request: Request) -> set[str]:
    """What the path allows over all of its routes; the router looks at the first one only."""
    path = request.scope["path"]
    return {
        method
        for route in iter_route_contexts(request.app.routes)
        if isinstance(route.original_route, Route) and route.path_regex.match(path)
        for method in route.methods or ()
    }


def explain_validation(request: Request, error: RequestValidationError) -> GatewayError:
    """The first finding, without the input: a report of all of it would send a large body back whole."""
    details = error.errors()[0]
    location = details["loc"]
    if location == ("body",) and not is_json(request.headers.get("content-type", "")):
        content_type = shorten(request.headers.get("content-type"))
        return UnsupportedBody(f"Content-Type: {content_type} is not allowed; send application/json")
    if location == ("body",) and details["type"] == "missing":
        why = "; Upgrade: h2c, which is not offered, cuts it off" if "upgrade" in request.headers else ""
        return InvalidRequest(f"the body is missing: send a JSON object{why}", code="missing_body")
    if details["type"] == "json_invalid":
        return invalid_from(details, (), skip=len(location))
    return invalid_from(details, body_fields(request) if len(location) == 2 else (), skip=1)


def is_json(content_type: str) -> bool:
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))


def body_fields(request: Request) -> Iterable[str]:
    """The fields of the route's body."""
    field = getattr(request.scope.get("route"), "body_field", None)
    model = field.field_info.annotation if field is not None else None
    return model.model_fields if isinstance(model, type) and issubclass(model, BaseModel) else ()
