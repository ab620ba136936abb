"""`/openapi.json` says what the gateway does, and the gateway does what it says."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
import pytest_asyncio
import schemathesis
from fastapi import Depends
from schemathesis import engine
from schemathesis.engine import events

from app.errors import RETRYABLE_FAILURE, TABLE, UNKNOWN, ClientGone, GenerationFailed, Row, raises
from app.main import create_app
from app.openapi.document import describe
from app.openapi.tables import fill_in, make_tables
from app.openapi.words import BODIES
from app.settings import GatewaySettings
from broker.messages import MAX_SEED, JobError
from models.catalog import CATALOG_PATH, load_catalog
from tests.app.conftest import Api, StartApi
from tests.app.keys import Keys, bearer

REPOSITORY = Path(__file__).resolve().parents[3]
MODULE_LOOP = pytest.mark.asyncio(loop_scope="module")
Json = dict[str, Any]

# Headers of the connection and of browsers' protection, the same on every response.
EVERYWHERE = {
    "date",
    "content-length",
    "content-type",
    "transfer-encoding",
    "connection",
    "x-content-type-options",
    "referrer-policy",
    "x-frame-options",
}


@pytest.fixture(scope="module")
def document() -> Json:
    return create_app(GatewaySettings(allow_anonymous=True)).openapi()


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model, so that the limits in the document are exact."""
    path = tmp_path_factory.mktemp("catalog") / "catalog.toml"
    text = CATALOG_PATH.read_text(encoding="utf-8")
    path.write_text(text[: text.index("\n[mini-lcm-full]")], encoding="utf-8")
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(start_api: StartApi, catalog: Path) -> AsyncIterator[Api]:
    async with start_api(catalog=catalog, cache_s=60) as api:
        api.painter.step_s = 0
        yield api


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


# The document by itself


def test_it_is_openapi_3_1(document: Json) -> None:
    assert document["openapi"].startswith("3.1.")
    schema = schemathesis.openapi.from_dict(document)
    schema.validate()
    for component in document["components"]["schemas"].values():
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **component})


def test_every_reference_leads_somewhere(document: Json) -> None:
    names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert names == set(document["components"]["schemas"]), "nothing is missing, and nothing is left over"


def test_everything_has_its_words(document: Json) -> None:
    described = {tag["name"] for tag in document["tags"] if tag["description"]}
    for method, path, operation in operations(document):
        assert operation["description"], (method, path)
        assert set(operation["tags"]) <= described
        for parameter in operation["parameters"]:
            assert parameter.get("description"), (method, path, parameter["name"])
        for status, response in operation["responses"].items():
            assert response["description"], (method, path, status)
            assert "X-Request-Id" in response["headers"]
    for name in BODIES:
        properties = document["components"]["schemas"][name]["properties"]
        assert [field for field, schema in properties.items() if not schema.get("description")] == []


def test_operation_ids_stay(document: Json) -> None:
    """Generated clients name their functions by them."""
    assert {operation["operationId"] for _, _, operation in operations(document)} >= {
        "create_generation",
        "read_generation",
        "cancel_generation",
        "read_image",
        "read_image_by_index",
        "stream_events",
        "create_image",
        "list_models",
        "read_model",
        "livez",
        "readyz",
        "metrics",
    }


def test_no_answer_is_the_frameworks_own(document: Json) -> None:
    text = json.dumps(document)
    assert "HTTPValidationError" not in text
    assert all({"422", "default"}.isdisjoint(operation["responses"]) for _, _, operation in operations(document))


def test_an_error_that_a_dependency_notes_is_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(Exception):
        pass

    monkeypatch.setitem(TABLE, Refused, Row(403, "invalid_request_error", "refused_here", meaning="a test"))

    @raises(Refused)
    def dependency() -> None:
        return None

    app = create_app(GatewaySettings(allow_anonymous=True))
    app.get("/extra", dependencies=[Depends(dependency)], tags=["health"])(lambda: None)
    paths = describe(app, load_catalog(CATALOG_PATH), GatewaySettings(), has_keys=False)["paths"]
    response = paths["/extra"]["get"]["responses"]["403"]
    assert "`refused_here`: a test" in response["description"]
    assert "refused_here" in json.dumps(response["content"]["application/json"]["schema"])


def test_every_code_of_a_failed_request_is_documented() -> None:
    sources = [*REPOSITORY.glob("broker/**/*"), *REPOSITORY.glob("workers/**/*.py"), *REPOSITORY.glob("app/**/*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources if path.suffix in (".py", ".lua"))
    used = set(re.findall(r"JobError\(\s*\"(\w+)\"|make_failure\([^,]+, '(\w+)'", text))
    known = {*TABLE[GenerationFailed].codes, *RETRYABLE_FAILURE.codes, UNKNOWN.code}
    assert {name for pair in used for name in pair if name} <= known
    assert len(used) >= 4


def test_every_kind_of_error_is_noted_on_some_route(document: Json) -> None:
    """A new row in the table has to say by `raises` which routes it leaves."""
    answers = [response for _, _, operation in operations(document) for response in operation["responses"].values()]
    text = json.dumps([answer.get("content", {}).get("application/json") for answer in answers])
    assert {kind for kind, row in TABLE.items() if kind is not ClientGone and f'"{row.code}"' not in text} == set()


def test_every_code_that_is_raised_is_in_the_table(document: Json) -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in REPOSITORY.glob("app/**/*.py"))
    used = set(re.findall(r"\bcode=\"(\w+)\"", text))
    documented = set(re.findall(r"`(\w+)`", make_tables(document)["errors"]))
    assert used <= documented
    assert used


def test_the_tables_of_the_docs_are_up_to_date(document: Json) -> None:
    page = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")
    assert page.count("<!-- table: ") == 4
    assert fill_in(page, make_tables(document)) == page, "run: python -m app.openapi docs/api.md"


# The document and the gateway


CONFIG: Json = {
    "seed": 7,
    "request-timeout": 30,
    "generation": {"max-examples": 25, "database": "none"},
    "phases": {"stateful": {"generation": {"max-examples": 10}}},
    "checks": {
        # DELETE cancels: what was drawn already can be read for as long as it is kept.
        "use_after_free": {"enabled": False},
        # A generation that is drawn asynchronously is there at once, its picture is not.
        "ensure_resource_availability": {"enabled": False},
        # A deadline of a millisecond is a right request, and 504 its right answer.
        "not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", "504"]},
    },
}


def keeps_to_unwritten_rules(_: object, case: Any) -> bool:
    """What JSON Schema can't say: picture i is drawn from seed + i, within 2^53 - 1, and each LoRA is given once."""
    if not isinstance(case.body, dict):
        return True
    numbers = [case.body.get(name) for name in ("seed", "num_images", "n")]
    has_room = sum(number for number in numbers if isinstance(number, int | float)) <= MAX_SEED
    loras = case.body.get("loras")
    names = [str(lora.get("name")) for lora in loras if isinstance(lora, dict)] if isinstance(loras, list) else []
    return has_room and len(names) == len(set(names))


def find_contradictions(url: str, **changes: Any) -> tuple[dict[str, str], Counter[str]]:
    """What schemathesis finds, each with the request that shows it, and how many requests each phase sent."""
    schema = schemathesis.openapi.from_url(
        f"{url}/openapi.json", config=schemathesis.Config.from_dict(CONFIG | changes)
    )
    schema.hooks.hook("filter_case")(keeps_to_unwritten_rules)
    found: dict[str, str] = {}
    num_requests: Counter[str] = Counter()
    for event in engine.from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            found[repr(event)] = "the engine itself failed"
        if isinstance(event, events.ScenarioFinished):
            num_requests[event.phase.name] += len(event.recorder.cases)
            for checks in event.recorder.checks.values():
                for check in checks:
                    if failure := check.failure_info:
                        found[f"{check.name}: {failure.failure.message[:600]}"] = failure.code_sample
    return found, num_requests


@MODULE_LOOP
async def test_the_gateway_keeps_to_its_document(api: Api) -> None:
    """Examples, coverage of every schema, fuzzing and chains of requests, with all of schemathesis' checks."""
    found, num_requests = await asyncio.to_thread(find_contradictions, api.url)
    assert not found, "\n\n".join(f"{what}\n{request}" for what, request in found.items())
    assert num_requests["COVERAGE"] > 300
    assert all(num_requests[phase] for phase in ("EXAMPLES", "FUZZING", "STATEFUL_TESTING"))


async def test_so_does_one_that_asks_for_keys(start_api: StartApi, catalog: Path, keys: Keys) -> None:
    """With a key that has rates; among the checks is that nobody gets in without it."""
    key = keys.make(max_requests_per_minute=100_000, max_images_per_minute=100_000)
    async with start_api(catalog=catalog, api_keys_file=keys.path) as api:
        api.painter.step_s = 0
        changes = {"headers": bearer(key), "phases": {"stateful": {"enabled": False}}}
        found, num_requests = await asyncio.to_thread(find_contradictions, api.url, **changes)
    assert not found, "\n\n".join(f"{what}\n{request}" for what, request in found.items())
    assert num_requests["COVERAGE"] > 300


def list_examples(document: Json) -> list[tuple[str, str, str, Json]]:
    return [
        (method, path, name, example["value"])
        for method, path, operation in operations(document)
        for name, example in operation.get("requestBody", {"content": {}})["content"]
        .get("application/json", {})
        .get("examples", {})
        .items()
    ]


@MODULE_LOOP
async def test_every_example_runs(api: Api) -> None:
    document = (await api.http.get("/openapi.json")).json()
    examples = list_examples(document)
    assert len(examples) >= 4
    for method, path, name, value in examples:
        answer = await api.http.request(method, path, json=value)
        assert answer.is_success, (path, name, answer.text)
        check_headers(document["paths"][path][method.lower()], answer)


def check_headers(operation: Json, answer: httpx.Response) -> None:
    """Whether all headers of an answer are documented."""
    documented = {name.lower() for name in operation["responses"][str(answer.status_code)].get("headers", ())}
    assert set(answer.headers) - EVERYWHERE <= documented, (operation["operationId"], answer.status_code)


@MODULE_LOOP
async def test_every_header_and_every_event_is_documented(api: Api) -> None:
    document = (await api.http.get("/openapi.json")).json()
    made = await api.http.post("/v1/generations", json={"prompt": "a red apple", "previews": True})
    values = {"{generation_id}": made.json()["id"], "{index}": "0", "{model}": "mini-lcm"}
    for method, path, operation in operations(document):
        if method != "POST":
            url = re.sub(r"\{\w+\}", lambda name: values[name[0]], path)
            answer = await api.http.request(method, url)
            assert answer.status_code == 200, url
            check_headers(operation, answer)
    images = await api.http.post("/v1/generations", json={"prompt": "x"}, headers={"Accept": "image/png"})
    check_headers(document["paths"]["/v1/generations"]["post"], images)


@MODULE_LOOP
async def test_failures_are_documented_too(api: Api, document: Json) -> None:
    operation = document["paths"]["/v1/generations"]["post"]
    for error in (JobError("internal_error", "it broke"), JobError("worker_lost", "it went", is_retryable=True)):
        api.painter.fail_with = error
        answer = await api.http.post("/v1/generations", json={"prompt": "x"})
        api.painter.fail_with = None
        schema = operation["responses"][str(answer.status_code)]["content"]["application/json"]["schema"]
        jsonschema_rs.validator_for({**schema, "components": document["components"]}).validate(answer.json())
        check_headers(operation, answer)
