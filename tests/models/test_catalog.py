from pathlib import Path

import pytest

from models.catalog import CatalogError, UnknownModelError, get_spec, load_catalog
from tests.small_models import write_catalog

MINIMAL = """
[small]
description = "d"
family = "sd"
source = "somewhere"
license = "MIT"
default_scheduler = "lcm"
num_inference_steps = { default = 4, min = 1, max = 8 }
guidance_scale = { default = 0, min = 0, max = 2 }
sizes = [[64, 64], [64, 96]]
warm_sizes = [[64, 64]]
schedulers = { lcm = { class_name = "LCMScheduler" } }
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "catalog.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_catalog_loads() -> None:
    catalog = load_catalog()
    assert catalog["mini-lcm"].default_size == (64, 64)
    assert catalog["mini-lcm"].source == "bundled:mini-sd"


def test_defaults(tmp_path: Path) -> None:
    spec = load_catalog(write(tmp_path, MINIMAL))["small"]
    assert (spec.name, spec.default_size, spec.public_revision) == ("small", (64, 64), "unpinned")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('family = "sd"', 'family = "sd9"', r"\[small\] family"),
        ('license = "MIT"\n', "", r"\[small\] license: Field required"),
        ('license = "MIT"', 'license = "MIT"\nlicence = "MIT"', r"\[small\] licence: Extra inputs"),
        ("default = 4,", "default = 9,", r"min <= default <= max is needed, got 1, 9, 8"),
        ('default_scheduler = "lcm"', 'default_scheduler = "ddim"', r"default_scheduler 'ddim' is none of lcm"),
        ("warm_sizes = [[64, 64]]", "warm_sizes = [[8, 8]]", r"warm_sizes \[\(8, 8\)\] are not in sizes"),
        ("[small]", "small = 3\n[other]", "'small' must be a table"),
        ("[small]", "loras = 3\n[small]", "'loras' must hold one table per LoRA"),
        ('license = "MIT"', 'license = "MIT"\nloras = ["x"]', r"\[small\] loras: said by the names of tables"),
        ('"LCMScheduler"', '"HeunDiscreteScheduler"', r"schedulers.lcm.class_name: .*'LCMScheduler'.*got 'Heun"),
        ('license = "MIT"', 'license = "MIT"\nguidance = "none"', "guidance is none, so max can be at most 1, got 2"),
        ('"somewhere"', '"some.safetensors"', "config: a single file needs it"),
        ('license = "MIT"', 'license = "MIT"\nconfig = "x"', "config: a single file needs it"),
        ('license = "MIT"', 'license = "MIT"\nclasses = "imagenet"', "classes: the consistency family needs it"),
        (
            'class_name = "LCMScheduler"',
            'class_name = "LCMScheduler", timesteps = { 2 = [999] }',
            r"timesteps: 2 falling numbers are needed, got \[999\]",
        ),
        (
            'class_name = "LCMScheduler"',
            'class_name = "LCMScheduler", timesteps = { 2 = [0, 22] }',
            "timesteps: 2 falling numbers are needed",
        ),
        (
            'class_name = "LCMScheduler"',
            'class_name = "DDIMScheduler", timesteps = { 1 = [999] }',
            "timesteps: DDIMScheduler takes none; LCMScheduler, TCD",
        ),
        ("[small]", "[small", "catalog.toml"),
    ],
)
def test_errors_name_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(CatalogError, match=message) as caught:
        load_catalog(write(tmp_path, MINIMAL.replace(old, new)))
    assert "catalog.toml" in str(caught.value)


CONSISTENCY = (
    MINIMAL.replace('"sd"', '"consistency"')
    .replace('"LCMScheduler"', '"CMStochasticIterativeScheduler"')
    .replace("max = 2 }", "max = 0 }")
    .replace('license = "MIT"', 'license = "MIT"\nguidance = "none"\nclasses = "imagenet"')
)


def test_a_class_conditional_model_knows_its_classes(tmp_path: Path) -> None:
    names = load_catalog(write(tmp_path, CONSISTENCY))["small"].class_names
    assert names is not None
    assert names.find("zebra") == 340
    assert load_catalog(write(tmp_path, MINIMAL))["small"].class_names is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('classes = "imagenet"', "", "classes: the consistency family needs it"),
        ('classes = "imagenet"', 'classes = "no.txt"', r"no\.txt: .*No such file"),
        ('guidance = "none"', "", "guidance: the consistency family has none, got classifier-free"),
        ('classes = "imagenet"', 'classes = "imagenet"\nvae = "x"', "vae: the consistency family has no use for it"),
        (
            'classes = "imagenet"',
            'classes = "imagenet"\nlora = { source = "x" }',
            "lora: the consistency family has no use",
        ),
    ],
)
def test_errors_of_a_class_conditional_model(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(CatalogError, match=rf"catalog\.toml: \[small\].*{message}"):
        load_catalog(write(tmp_path, CONSISTENCY.replace(old, new)))


def test_rows_of_one_request_fit_its_batch(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="max_num_images 5 with guidance needs 10 rows, max_batch_size is 8"):
        load_catalog(write(tmp_path, MINIMAL.replace('"MIT"', '"MIT"\nmax_num_images = 5')))


LORA = """
[loras.ink]
description = "d"
source = "elsewhere"
license = "MIT"
models = ["small"]
"""


def test_a_style_lora_belongs_to_the_models_that_it_names(tmp_path: Path) -> None:
    other = MINIMAL.replace("[small]", "[other]")
    catalog = load_catalog(write(tmp_path, MINIMAL + other + LORA))
    assert list(catalog["small"].loras) == ["ink"]
    assert catalog["other"].loras == {}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('["small"]', '["big"]', r"\[loras.ink\] models: unknown model 'big', there are small"),
        ('license = "MIT"', "", r"\[loras.ink\] license: Field required"),
        ('"MIT"', '"MIT"\nwieght = 3', r"\[loras.ink\] wieght: Extra inputs are not permitted; known are name, "),
        ('"MIT"', '"MIT"\nweight_name = "x.bin"', r"\[loras.ink\] weight_name: .*safetensors.*got 'x.bin'"),
    ],
)
def test_errors_of_a_style_lora_name_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(CatalogError, match=message) as caught:
        load_catalog(write(tmp_path, MINIMAL + LORA.replace(old, new)))
    assert "catalog.toml" in str(caught.value)


def test_a_users_own_file_adds_and_replaces(tmp_path: Path) -> None:
    base = write(tmp_path, MINIMAL)
    extra = tmp_path / "own.toml"
    extra.write_text(MINIMAL.replace("[small]", "[mine]") + MINIMAL.replace('"MIT"', '"BSD"') + LORA, encoding="utf-8")
    catalog = load_catalog(base, extra)
    assert list(catalog) == ["small", "mine"]
    assert catalog["small"].license == "BSD"
    assert list(catalog["small"].loras) == ["ink"]
    extra.write_text("[mine]", encoding="utf-8")
    with pytest.raises(CatalogError, match=r"own\.toml: \[mine\] description: Field required"):
        load_catalog(base, extra)


def test_a_written_catalog_reads_back_as_it_was(tmp_path: Path) -> None:
    """What the tests of other parts rely on."""
    specs = load_catalog() | load_catalog(write(tmp_path, MINIMAL + LORA))
    scheduler = 'CMStochasticIterativeScheduler", timesteps = { 2 = [22, 0] }'
    own = CONSISTENCY.replace("[small]", "[own]").replace('CMStochasticIterativeScheduler"', scheduler)
    specs |= load_catalog(write(tmp_path, own))
    assert specs["own"].schedulers["lcm"].timesteps == {2: [22, 0]}
    assert load_catalog(write_catalog(tmp_path / "again.toml", list(specs.values()))) == specs


def test_unknown_model_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"unknown model 'big': the catalog has small"):
        get_spec(load_catalog(write(tmp_path, MINIMAL)), "big")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"nowhere\.toml"):
        load_catalog(tmp_path / "nowhere.toml")
