"""docs/models.md says what the catalog says, and its examples work."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from models.catalog import CATALOG_PATH, ModelSpec, load_catalog
from models.loading import load_pipeline
from tests.docs.models_tables import TABLES
from tests.docs.test_docs import DOCS
from tests.single_file import write_single_file
from tests.small_models import make_lora_folder, make_sd_folder

PAGE = (DOCS / "models.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_the_tables_are_the_catalogs(table: Callable[[], Iterator[str]]) -> None:
    expected = "\n".join(table())
    assert expected in PAGE, f"python -m tests.docs.models_tables prints it:\n{expected}"


def test_every_note_of_a_licence_is_read_before_use() -> None:
    notes = {spec.license_note for spec in load_catalog().values()}
    assert all(note in PAGE for note in notes)


def test_examples_are_entries(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text("".join(EXAMPLES), encoding="utf-8")
    assert set(load_catalog(CATALOG_PATH, path)) > set(load_catalog())


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples name, made small: /models/… stands for it."""
    shelf = tmp_path_factory.mktemp("models")
    make_sd_folder(shelf / "my-sd15")
    make_lora_folder(shelf / "my-lcm-lora", shelf / "my-sd15")
    write_single_file(shelf / "my-sd15", shelf / "my-checkpoint.safetensors")
    return shelf


@pytest.mark.parametrize("name", ["my-sd15", "my-checkpoint"])
def test_examples_load(name: str, shelf: Path, tmp_path: Path) -> None:
    """Folders that they name are there, of the Hub's repositories the small ones."""
    path = tmp_path / "own.toml"
    path.write_text("".join(EXAMPLES).replace("/models/", f"{shelf}/"), encoding="utf-8")
    spec = load_catalog(CATALOG_PATH, path)[name]
    pipeline = load_pipeline(localised(spec, shelf), torch.device("cpu"), torch.float32)
    assert set(pipeline.schedules) == set(spec.schedulers)


def localised(spec: ModelSpec, shelf: Path) -> ModelSpec:
    assert spec.lora is not None
    config = None if spec.config is None else str(shelf / "my-sd15")
    lora = spec.lora.model_copy(update={"source": str(shelf / "my-lcm-lora")})
    return spec.model_copy(update={"config": config, "lora": lora, "tiny_vae": None})
