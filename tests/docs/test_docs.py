"""What the documentation lists is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from pydantic_settings import BaseSettings

from app.errors import TABLE
from app.live.protocol import CloseCode
from app.main import create_app
from app.metrics import Metrics
from app.schemas import GenerationFields, ModelCard
from app.settings import GatewaySettings
from workers.metrics import WorkerMetrics
from workers.settings import WorkerSettings

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
READMES = [REPOSITORY / "benchmarks" / "README.md", REPOSITORY / "clients" / "python" / "README.md"]
OPENAIS = {"object", "created", "owned_by"}  # which OpenAI's clients read, and say nothing here
PAGES = sorted([*DOCS.rglob("*.md"), *REPOSITORY.glob("*.md"), *READMES])


def section(page: str, title: str) -> str:
    """The text under a heading, up to the next one of any level."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.split(rf"^#+ {re.escape(title)}$", text, maxsplit=1, flags=re.MULTILINE)[1].partition("\n#")[0]


def first_cells(text: str) -> dict[str, str]:
    """The rows of a table by the name in their first cell."""
    return {row[1]: row[0] for row in re.finditer(r"^\| `([\w*]+)` \|.*$", text, re.MULTILINE)}


@pytest.mark.parametrize(("title", "settings"), [("Gateway", GatewaySettings), ("Worker", WorkerSettings)])
def test_every_setting_has_its_line(title: str, settings: type[BaseSettings]) -> None:
    lines = first_cells(section("operations.md", title))
    assert set(lines) == {f"FEWSTEP_{name.upper()}" for name in settings.model_fields}
    for name, field in settings.model_fields.items():
        if isinstance(field.default, str | int | float):
            default = str(field.default).lower().removesuffix(".0")
            assert f"| `{default}` |" in lines[f"FEWSTEP_{name.upper()}"], name


@pytest.mark.parametrize(
    ("title", "registry"), [("Gateway's metrics", Metrics().registry), ("Worker's metrics", WorkerMetrics().registry)]
)
def test_every_metric_has_its_line(title: str, registry: CollectorRegistry) -> None:
    documented = set(first_cells(section("operations.md", title)))
    names = {
        metric.name + ("_total" if metric.type == "counter" else "")
        for metric in registry.collect()
        if "_process_" not in metric.name
    }
    assert documented - {"fewstep_gateway_process_*"} == names


def test_every_route_is_described() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`((?:GET|POST|DELETE|WS) /[^`]*)`", text))
    paths = create_app(GatewaySettings(allow_anonymous=True)).openapi()["paths"]
    routes = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert routes | {"WS /v1/live", "GET /"} <= described


def test_every_field_of_a_generation_is_described() -> None:
    words = set(re.findall(r"`(\w+)`", section("api.md", "POST /v1/generations")))
    assert set(GenerationFields.model_fields) <= words


def test_every_field_of_a_model_is_described() -> None:
    entry = section("api.md", "Models").partition("An entry has")[2]
    assert set(ModelCard.model_fields) - OPENAIS <= set(re.findall(r"`(\w+)`", entry))


def test_every_error_code_is_described() -> None:
    words = set(re.findall(r"`(\w+)`", section("api.md", "Errors")))
    assert {row.code for row in TABLE.values()} - {"client_gone"} <= words


def test_every_close_code_is_described() -> None:
    described = {int(code) for code in re.findall(r"^\| (\d{4})", section("live-protocol.md", "Closing"), re.MULTILINE)}
    assert {code.value for code in CloseCode} <= described


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target
