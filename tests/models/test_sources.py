"""Places on this machine. What comes from the Hub is tested in tests/test_models_commands.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.catalog import BUNDLED_PATH, LoraSpec, load_catalog
from models.sources import Place, SourceError, local_path, locate
from tests.small_models import small_spec


@pytest.fixture
def tmp(tmp_path: Path) -> Path:
    """Where `small_spec` finds that there is nothing to make."""
    (tmp_path / "sd").mkdir()
    return tmp_path


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_bundled_models() -> None:
    spec = load_catalog()["mini-lcm"]
    assert locate(spec, "source") == Place(BUNDLED_PATH / "mini-sd", spec.revision)
    assert locate(spec, "tiny_vae") == Place(BUNDLED_PATH / "mini-taesd", None)
    weights = BUNDLED_PATH / "mini-lcm-lora" / "pytorch_lora_weights.safetensors"
    assert locate(spec, "lora") == Place(weights, None)


def test_a_folder_and_a_single_file(tmp: Path) -> None:
    assert locate(small_spec(tmp, source=str(tmp / "sd")), "source").path == tmp / "sd"
    file = touch(tmp / "one.safetensors")
    spec = small_spec(tmp, source=str(file), config=str(tmp / "sd"))
    assert (locate(spec, "source").path, locate(spec, "config").path) == (file, tmp / "sd")


@pytest.mark.parametrize(("part", "folder"), [("unet", ""), ("unet", "unet"), ("vae", "vae"), ("tiny_vae", "vae")])
def test_a_network_lies_where_its_config_is(tmp: Path, part: str, folder: str) -> None:
    touch(tmp / "network" / folder / "config.json")
    assert locate(small_spec(tmp, **{part: str(tmp / "network")}), part).path == tmp / "network" / folder


@pytest.mark.parametrize(
    ("changes", "part", "message"),
    [
        ({"source": "/nowhere/sd"}, "source", "small: source: there is no folder /nowhere/sd"),
        ({"source": "bundled:maxi"}, "source", "small: source: there is no folder .*bundled/maxi"),
        ({"source": "a.safetensors", "config": "x"}, "source", "small: source: there is no file a.safetensors"),
        ({"vae": "./models/vae"}, "vae", "small: vae: there is no folder models/vae"),
    ],
)
def test_what_is_not_there_is_named(tmp: Path, changes: dict[str, str], part: str, message: str) -> None:
    with pytest.raises(SourceError, match=f"^{message}$"):
        locate(small_spec(tmp, **changes), part)


def test_a_lora_that_the_folder_has_not(tmp: Path) -> None:
    touch(tmp / "lora" / "other.safetensors")
    spec = small_spec(tmp, lora=LoraSpec(source=str(tmp / "lora"), weight_name="pixel.safetensors"))
    with pytest.raises(SourceError, match=r"small: lora: .* has no pixel.safetensors; it has other.safetensors"):
        locate(spec, "lora")


@pytest.mark.parametrize("source", ["acme/sd", "acme/sd-1.5_x", "gpt2"])
def test_a_repository_is_no_path(source: str) -> None:
    assert local_path(source) is None


@pytest.mark.parametrize("source", ["/a/b", "./a/b", "../a", "~/a", "a/b/c", "a.safetensors", "a/b.safetensors"])
def test_a_path_is_no_repository(source: str) -> None:
    assert local_path(source) == Path(source).expanduser()


def test_a_folder_that_is_there_goes_before_a_repository(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp / "acme" / "sd").mkdir(parents=True)
    monkeypatch.chdir(tmp)
    assert local_path("acme/sd") == Path("acme/sd")
