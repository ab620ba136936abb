from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.service import Service, free_port, start_service
from tests.small_models import write_small_catalog


def fewstep(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FEWSTEP_")}
    return subprocess.run(
        [sys.executable, "-m", "cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=clean | {"COLUMNS": "200"} | environment,
    )


def assert_one_clear_line(result: subprocess.CompletedProcess[str], *words: str, status: int = 78) -> None:
    assert result.returncode == status, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("fewstep: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize("command", ["serve", "gateway", "worker", "generate", "models", "keys", "distill"])
def test_help_teaches(command: str) -> None:
    assert command in fewstep("--help").stdout
    result = fewstep(command, "--help")
    assert result.returncode == 0
    assert command in ("models", "keys", "distill") or "Example: " in result.stdout


def test_the_catalog_is_listed() -> None:
    output = fewstep("models", "list").stdout
    assert "mini-lcm" in output
    assert "sd15-lcm" in output


def test_generate_draws_a_reproducible_picture(tmp_path: Path) -> None:
    prompt = "a red apple on a blue background"
    for name in ("one.png", "two.png"):
        result = fewstep("generate", prompt, "-o", str(tmp_path / name), "--seed", "3")
        assert result.returncode == 0, result.stderr
        assert "seed 3" in result.stderr
    one, two = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert one == two
    with Image.open(io.BytesIO(one)) as image:
        assert image.size == (64, 64)
        assert json.loads(image.info["parameters"])["prompt"] == prompt


def test_generate_takes_style_loras_and_a_decoder(tmp_path: Path) -> None:
    path = tmp_path / "sketch.png"
    arguments = ("-o", str(path), "--seed", "3", "--lora", "sketch:0.5", "--lora", "neon", "--decoder", "tiny")
    result = fewstep("generate", "a red apple on a blue background", *arguments)
    assert result.returncode == 0, result.stderr
    with Image.open(path) as image:
        used = json.loads(image.info["parameters"])
    assert used["loras"] == [{"name": "neon", "weight": 1.0}, {"name": "sketch", "weight": 0.5}]
    assert used["decoder"] == "tiny"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "999"], ["num_inference_steps", "999", "1 to"]),
        (["--width", "65"], ["65", "64x64"]),
        (["--scheduler", "magic"], ["scheduler", "magic", "lcm"]),
        (["--model", "nothing"], ["unknown model 'nothing'", "mini-lcm"]),
        (["--lora", "magic"], ["loras", "magic", "neon", "sketch"]),
        (["--lora", "sketch:much"], ["--lora sketch:much", "NAME:WEIGHT", "'much'"]),
        (["--lora", "sketch:99"], ["loras.0.weight=99", "10"]),
        (["--decoder", "magic"], ["decoder='magic'", "'tiny'"]),
        (["-o", "picture.txt"], ["picture.txt", ".png"]),
    ],
)
def test_bad_input_is_named(arguments: list[str], words: list[str]) -> None:
    assert_one_clear_line(fewstep("generate", "an apple", *arguments), *words)


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_one_clear_line(fewstep("serve", "--port", port), port, "Address already in use", "--port")


def test_a_host_that_others_can_reach_needs_permission() -> None:
    assert_one_clear_line(fewstep("serve", "--host", "0.0.0.0"), "0.0.0.0", "FEWSTEP_ALLOW_ANONYMOUS=1", "keys create")


def test_a_redis_that_does_not_answer() -> None:
    assert_one_clear_line(fewstep("serve", FEWSTEP_REDIS_URL="redis://127.0.0.1:1"), "Redis", "127.0.0.1:1")


def test_an_unknown_model() -> None:
    assert_one_clear_line(fewstep("serve", "--model", "nothing"), "unknown model 'nothing'", "mini-lcm")


def test_an_unknown_model_beside_the_default_one() -> None:
    assert_one_clear_line(fewstep("serve", FEWSTEP_MODELS="mini-lcm,nothing"), "unknown model 'nothing'", "mini-lcm")


@pytest.mark.parametrize(
    ("arguments", "default", "names"),
    [([], "mini-lcm", ["mini-lcm", "small"]), (["--model", "small"], "small", ["small", "mini-lcm"])],
)
def test_serve_keeps_all_models_warm_the_default_one_first(
    tmp_path: Path, arguments: list[str], default: str, names: list[str]
) -> None:
    settings = {"FEWSTEP_EXTRA_CATALOG": str(write_small_catalog(tmp_path)), "FEWSTEP_MODELS": "mini-lcm,small"}
    service = start_service(tmp_path / "serve.log", *arguments, **settings)
    try:
        assert httpx.get(f"{service.url}/v1/models").json()["default"] == default
        assert service.child("worker").environ()["FEWSTEP_MODELS"].split(",") == names
        until_warm(service, names)
    finally:
        service.stop()


def until_warm(service: Service, names: list[str]) -> None:
    deadline_s = time.monotonic() + 60
    while httpx.get(f"{service.url}/readyz", timeout=5).json()["models"] != sorted(names):
        assert time.monotonic() < deadline_s, service.log.read_text()
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("FEWSTEP_DTYPE", "float7"), ("FEWSTEP_LEASE_S", "-1"), ("FEWSTEP_MODELS", "nothing"), ("FEWSTEP_DEVICE", "gpu9")],
)
def test_a_bad_worker_setting(variable: str, value: str) -> None:
    result = fewstep("worker", **{variable: value})
    assert result.returncode == 78
    assert value in result.stderr.splitlines()[-1]


def test_a_damaged_model_ends_serve_with_its_name(tmp_path: Path) -> None:
    catalog = write_small_catalog(tmp_path)
    weights = next((tmp_path / "sd" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    result = fewstep("serve", "--model", "small", "--port", str(free_port()), FEWSTEP_CATALOG=str(catalog))
    assert result.returncode == 78
    reasons = [line for line in result.stderr.splitlines() if line.startswith("fewstep: ")]
    assert reasons == [line for line in reasons if str(weights) in line and "not a sound safetensors file" in line]
    assert len(reasons) == 1


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    path = str(tmp_path / "keys.toml")
    made = fewstep("keys", "create", "shop", "--file", path, "--images-per-minute", "120", "--model", "mini-lcm")
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    key_id = key.split("_")[1]
    assert key.split("_", 2)[2] not in made.stderr
    assert f"{key_id}:" in made.stderr
    listed = fewstep("keys", "list", FEWSTEP_API_KEYS_FILE=path).stdout
    for word in (key_id, "shop", "120", "unlimited", "mini-lcm", "api, live"):
        assert word in listed
    assert key_id in fewstep("keys", "list", "--file", path, COLUMNS="60").stdout  # to be revoked by
    revoked = fewstep("keys", "revoke", key_id, "--file", path)
    assert (revoked.returncode, "shop is revoked" in revoked.stderr) == (0, True)
    assert key_id not in fewstep("keys", "list", "--file", path).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["create", "x", "--model", "nothing"], ["unknown model 'nothing'", "mini-lcm"]),
        (["create", "x", "--lane", "fast"], ["lanes", "fast"]),
        (["create", "x", "--weight", "0"], ["weight=0", "greater than or equal to 1"]),
        (["list"], ["keys.toml", "No such file"]),
        (["revoke", "x"], ["keys.toml", "No such file"]),
    ],
)
def test_a_mistake_with_keys_is_one_clear_line(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    path = tmp_path / "keys.toml"
    assert_one_clear_line(fewstep("keys", *arguments, "--file", str(path)), *words)
    assert not path.exists()


def test_a_key_can_only_go_where_there_is_a_folder(tmp_path: Path) -> None:
    assert_one_clear_line(
        fewstep("keys", "create", "x", "--file", str(tmp_path / "no" / "keys.toml")), "no", "No such file"
    )
