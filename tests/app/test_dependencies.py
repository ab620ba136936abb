from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, APIWebSocketRoute

from app.routes import generations, health, live, models, openai_images, page


def test_no_request_needs_a_thread() -> None:
    """FastAPI runs plain functions in threads, for half a millisecond each."""
    plain = {
        call.__qualname__
        for routes in (generations, openai_images, live, models, health, page)
        for route in routes.router.routes
        if isinstance(route, APIRoute | APIWebSocketRoute)
        for call in calls_of(route.dependant)
        if not (inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call))
    }
    assert plain == set()


def calls_of(dependant: Dependant) -> Iterator[Callable[..., Any]]:
    if dependant.call is not None:
        yield dependant.call
    for inner in dependant.dependencies:
        yield from calls_of(inner)
