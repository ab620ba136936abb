"""The client stands alone: its own wheel, nothing of this repository, and the fields of the service's schemas."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

import fewstep_client
from app import schemas
from app.live.protocol import SUBPROTOCOL, CloseCode, show_authenticated, show_ready
from fewstep_client import Authenticated, Fields, LiveFields, LiveToken, Lora, Ready, Refine, Timings, live

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / "clients" / "python"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip makes of it, without the network. A build leaves files beside its source, so it gets a copy."""
    folder = tmp_path_factory.mktemp("installed")
    copy = shutil.copytree(SOURCE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    options = ["--disable-pip-version-check", "--target", str(folder / "target")]
    subprocess.run([*command, *options, str(copy)], check=True, timeout=120)
    return folder / "target"


def test_the_wheel_has_the_package_and_its_types(installed: Path) -> None:
    modules = {path.name for path in (SOURCE / "src" / "fewstep_client").iterdir() if path.is_file()}
    assert {path.name for path in (installed / "fewstep_client").iterdir() if path.is_file()} == modules
    assert "py.typed" in modules
    [metadata] = installed.glob("fewstep_client-*.dist-info/METADATA")
    required = [line for line in metadata.read_text("utf-8").splitlines() if line.startswith("Requires-Dist")]
    assert [line.split()[1].split(">")[0] for line in required] == ["httpx", "websockets"]


def test_importing_it_loads_nothing_of_this_repository(installed: Path) -> None:
    code = "import sys, fewstep_client; print(fewstep_client.__file__); print(*sorted(sys.modules))"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(installed)!r}); {code}"]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=installed).stdout
    place, modules = output.splitlines()
    assert Path(place).is_relative_to(installed)
    foreign = {"app", "broker", "cli", "commands", "models", "workers", "torch", "numpy", "pydantic", "PIL"}
    assert foreign.isdisjoint(name.partition(".")[0] for name in modules.split())


def test_all_that_is_public_is_listed() -> None:
    assert fewstep_client.__all__ == sorted(fewstep_client.__all__)
    public = {name for name, value in vars(fewstep_client).items() if getattr(value, "__module__", "").startswith("fe")}
    assert public <= set(fewstep_client.__all__)
    assert all(getattr(fewstep_client, name).__doc__ for name in fewstep_client.__all__ if name != "LiveEvent")


@pytest.mark.parametrize(
    ("typed", "schema", "own"),
    [
        (Fields, schemas.GenerationRequest, {"prompt", "previews"}),
        (LiveFields, schemas.LiveGenerate, {"prompt", "type", "seq"}),
        (Refine, schemas.Refine, set()),
        (Lora, schemas.LoraChoice, set()),
    ],
)
def test_the_fields_are_those_of_the_service(
    typed: type, schema: type[schemas.GenerationFields], own: set[str]
) -> None:
    """`own` are set by the client itself."""
    assert set(get_type_hints(typed)) == set(schema.model_fields) - own


def test_the_answers_are_those_of_the_service() -> None:
    ready = show_ready("s", 1, "m", dict.fromkeys(["max_unacked", "max_message_bytes", "idle_s", "token_expires_in_s"]))
    envelope = {"type", "seq", "request_id", "protocol"}
    assert {field.name for field in fields(Ready)} == set(ready) - envelope
    assert {field.name for field in fields(Authenticated)} == set(show_authenticated(None)) - envelope
    assert {field.name for field in fields(Timings)} == set(schemas.GenerationTimings.model_fields) - {"steps_ms"}
    assert {field.name for field in fields(LiveToken)} == set(schemas.LiveTokenAnswer.model_fields) - {"subprotocols"}


def test_the_protocol_is_that_of_the_service() -> None:
    assert (live.SUBPROTOCOL, live.NORMAL, live.TOO_BIG, live.AUTH, live.IDLE) == (
        SUBPROTOCOL,
        CloseCode.NORMAL,
        CloseCode.TOO_BIG,
        CloseCode.AUTH,
        CloseCode.IDLE,
    )
