"""The tables of docs/api.md, made from the document and from the table of errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from app.errors import BY_STATUS, RETRYABLE_FAILURE, TABLE, UNKNOWN, ClientGone, explained
from app.openapi.document import list_codes
from app.openapi.words import HEADERS, Json


def make_tables(document: Json) -> dict[str, str]:
    """The generated tables by the name that marks their place on the page."""
    fields = document["components"]["schemas"]["GenerationRequest"]["properties"]
    return {
        "routes": _table(("route", "meaning"), _route_lines(document)),
        "fields": _table(("field", "meaning"), [(f"`{name}`", field["description"]) for name, field in fields.items()]),
        "headers": _table(("header", "meaning"), _header_lines(document)),
        "errors": _table(("status", "`code`", "meaning"), _error_lines()),
    }


def _route_lines(document: Json) -> Iterator[tuple[str, str]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"`{method.upper()} {path}`", _first_sentence(operation["description"])
    yield "`WS /v1/live`", "[the live protocol](live-protocol.md)"
    yield "`GET /`", "the live page"


def _first_sentence(text: str) -> str:
    sentence = re.split(r"\.(?:\s|$)", " ".join(text.split()), maxsplit=1)[0]
    return sentence[:1].lower() + sentence[1:]


def _header_lines(document: Json) -> Iterator[tuple[str, str]]:
    used = {
        name
        for methods in document["paths"].values()
        for operation in methods.values()
        for response in operation["responses"].values()
        for name in response.get("headers", ())
    }
    for name, (description, _) in HEADERS.items():
        if name in used:
            yield f"`{name}`", description[:1].lower() + description[1:].rstrip(".")


def _error_lines() -> Iterator[tuple[str, str, str]]:
    rows = {*(explained(kind) for kind in TABLE if kind is not ClientGone), *BY_STATUS.values()}
    for row in sorted(rows | {UNKNOWN, RETRYABLE_FAILURE}, key=lambda row: (row.status, row.code, row.meaning)):
        yield str(row.status), list_codes(row), row.meaning


def _table(titles: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    rows = [titles, ("---",) * len(titles), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def fill_in(page: str, tables: Mapping[str, str]) -> str:
    """A page with its marked tables as they are now. Raises KeyError for a mark without a table."""
    pattern = r"(<!-- table: (\w+) -->\n).*?(\n<!-- end -->)"
    return re.sub(pattern, lambda mark: mark[1] + tables[mark[2]] + mark[3], page, flags=re.DOTALL)
