import tomllib
from pathlib import Path

import pytest

from models.catalog import CATALOG_PATH, CatalogError, ModelSpec, UnknownModelError, get_spec, load_catalog
from models.hub.needs import needs_of
from models.sources import locate
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


def test_a_copy_has_the_classes_that_it_names(tmp_path: Path) -> None:
    spec = load_catalog(write(tmp_path, CONSISTENCY))["small"]
    digits = tmp_path / "digits.txt"
    digits.write_text("zero\none\n", encoding="utf-8")
    names = spec.model_copy(update={"classes": str(digits)}).class_names
    assert names is not None
    assert names.find("one") == 1
    assert set(dict(spec)) == set(ModelSpec.model_fields)
    assert load_catalog(write(tmp_path, CONSISTENCY))["small"] == spec


def test_other_classes_in_the_same_file_make_it_another_entry(tmp_path: Path) -> None:
    classes, fingerprints = tmp_path / "classes.txt", set()
    for names in ("cat\ndog\n", "dog\ncat\n", "dog\ncat\n"):
        classes.write_text(names, encoding="utf-8")
        own = CONSISTENCY.replace('"imagenet"', f'"{classes}"')
        fingerprints.add(load_catalog(write(tmp_path, own))["small"].fingerprint)
    assert len(fingerprints) == 2


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


@pytest.mark.parametrize(
    ("entry", "size", "message"),
    [
        (MINIMAL, "[64, 60]", r"sizes: positive multiples of 8 are needed, got \[64, 60\]"),
        (MINIMAL, "[0, 64]", r"sizes: positive multiples of 8 are needed, got \[0, 64\]"),
        (MINIMAL, "[-64, 64]", r"sizes: positive multiples of 8 are needed, got \[-64, 64\]"),
        (CONSISTENCY, "[64, 0]", r"sizes: positive multiples of 1 are needed, got \[64, 0\]"),
    ],
)
def test_sizes_are_those_that_the_family_can_draw(tmp_path: Path, entry: str, size: str, message: str) -> None:
    with pytest.raises(CatalogError, match=rf"catalog\.toml: \[small\].*{message}"):
        load_catalog(write(tmp_path, entry.replace("[64, 96]", size)))


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
        (
            '"MIT"',
            '"MIT"\nweight = { default = 1, min = 0, max = 11 }',
            r"\[loras.ink\] weight: .*-10 to 10, got 0 and 11",
        ),
        ('"MIT"', '"MIT"\nweight = { default = 1, min = -20, max = 2 }', r"weight: .*-10 to 10, got -20 and 2"),
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


def test_a_style_lora_does_not_go_with_what_replaces_its_model(tmp_path: Path) -> None:
    base = write(
        tmp_path, MINIMAL + MINIMAL.replace("[small]", "[other]") + LORA.replace('"small"', '"small", "other"')
    )
    extra = tmp_path / "own.toml"
    extra.write_text(CONSISTENCY, encoding="utf-8")
    catalog = load_catalog(base, extra)
    assert (list(catalog["small"].loras), list(catalog["other"].loras)) == ([], ["ink"])
    extra.write_text(MINIMAL + LORA.replace("ink", "own"), encoding="utf-8")
    assert list(load_catalog(base, extra)["small"].loras) == ["own"]
    extra.write_text(LORA.replace('"small"', '"big"'), encoding="utf-8")
    with pytest.raises(CatalogError, match=r"own\.toml: \[loras.ink\] models: unknown model 'big'"):
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


# The shipped entries

LCM_LORAS = ("sd15-lcm", "dreamshaper-lcm-lora", "sdxl-lcm", "ssd-1b-lcm")
FULL_LCMS = ("lcm-dreamshaper-v7", "lcm-sdxl")
TURBOS = ("sdxl-turbo", "sd-turbo", "sdxl-turbo-lora")
SHIPPED = load_catalog()
PUBLISHED = {name: spec for name, spec in SHIPPED.items() if not spec.source.startswith("bundled:")}
LATENT = {name: spec for name, spec in PUBLISHED.items() if spec.family != "consistency"}


def ranges(spec: ModelSpec) -> tuple[float, float, float]:
    return spec.guidance_scale.min, spec.guidance_scale.default, spec.guidance_scale.max


def test_every_system_has_its_entry() -> None:
    assert {*LCM_LORAS, *FULL_LCMS, *TURBOS, "cm-imagenet64"} == set(PUBLISHED)


def test_what_is_bundled_is_there() -> None:
    needs = [need for spec in SHIPPED.values() for need in needs_of(spec) if need.source.startswith("bundled:")]
    assert {"source", "tiny_vae", "lora", "loras.neon"} <= {need.part for need in needs}
    assert all(locate(SHIPPED[need.model], need.part).path.exists() for need in needs)


@pytest.mark.parametrize("name", LCM_LORAS)
def test_an_lcm_lora_wants_no_guidance_or_a_little(name: str) -> None:
    spec = SHIPPED[name]
    assert (spec.guidance, *ranges(spec), spec.default_scheduler) == ("classifier-free", 0, 0, 2, "lcm")
    assert spec.lora is not None
    assert (spec.num_inference_steps.default, spec.num_inference_steps.max) == (4, 8)


@pytest.mark.parametrize("name", FULL_LCMS)
def test_a_full_lcm_reads_the_guidance_that_it_was_distilled_with(name: str) -> None:
    spec = SHIPPED[name]
    assert (spec.guidance, *ranges(spec), spec.default_scheduler) == ("embedded", 3, 8, 13, "lcm")
    assert spec.lora is None
    assert (spec.num_inference_steps.default, spec.num_inference_steps.max) == (4, 8)


@pytest.mark.parametrize("name", TURBOS)
def test_turbo_has_no_guidance_and_trailing_timesteps(name: str) -> None:
    spec = SHIPPED[name]
    assert (spec.guidance, *ranges(spec)) == ("none", 0, 0, 0)
    assert spec.schedulers[spec.default_scheduler].config == {"timestep_spacing": "trailing"}
    assert spec.schedulers["euler-ancestral"].class_name == "EulerAncestralDiscreteScheduler"


def test_a_consistency_model_is_asked_for_classes() -> None:
    spec = SHIPPED["cm-imagenet64"]
    assert (spec.guidance, *ranges(spec), spec.classes, spec.sizes) == ("none", 0, 0, 0, "imagenet", [(64, 64)])
    assert (spec.num_inference_steps.min, spec.num_inference_steps.max) == (1, 2)


@pytest.mark.parametrize("name", LATENT)
def test_sizes_suit_the_architecture(name: str) -> None:
    """Portrait and landscape, each within a factor of the pixels that the model was trained for."""
    spec = SHIPPED[name]
    assert any(width < height for width, height in spec.sizes), "no portrait"
    assert any(width > height for width, height in spec.sizes), "no landscape"
    assert {(height, width) for width, height in spec.sizes} == set(spec.sizes)
    assert all(side % 64 == 0 for size in spec.sizes for side in size)
    assert spec.warm_sizes == [spec.default_size]
    pixels = spec.default_size[0] * spec.default_size[1]
    smallest = 0.25 if spec.default_size != (512, 512) else 0.9
    assert all(smallest <= width * height / pixels <= 1.6 for width, height in spec.sizes)


@pytest.mark.parametrize("name", [name for name, spec in LATENT.items() if spec.family == "sdxl"])
def test_sdxl_decodes_by_a_vae_that_half_precision_suffices_for(name: str) -> None:
    assert SHIPPED[name].vae == "madebyollin/sdxl-vae-fp16-fix"


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_solver_starts_in_the_middle(name: str) -> None:
    """The spacing of a folder's own config may be "leading", whose first of few timesteps is far below the last one
    of training."""
    starts_at_the_end = {"LCMScheduler", "TCDScheduler", "CMStochasticIterativeScheduler"}
    for scheduler in SHIPPED[name].schedulers.values():
        assert scheduler.class_name in starts_at_the_end or scheduler.config["timestep_spacing"] == "trailing"


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_was_tested_and_what_it_takes_is_said(name: str) -> None:
    spec = SHIPPED[name]
    assert spec.tested_with == "random weights"
    assert spec.memory_gib is not None
    assert spec.license_url.startswith("https://huggingface.co/")


@pytest.mark.parametrize("name", [name for name, spec in PUBLISHED.items() if spec.license != "MIT"])
def test_a_licence_with_conditions_has_a_note(name: str) -> None:
    spec = SHIPPED[name]
    assert spec.license_note
    assert ("non-commercial" in spec.license_note) == ("Stability AI" in spec.license)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_users_file_can_say_all_that_ships(tmp_path: Path, name: str) -> None:
    """By copying an entry under another name; a key that nobody knows is refused in each."""
    text = CATALOG_PATH.read_text(encoding="utf-8")
    start = text.index(f"[{name}]")
    rows = text[start:].splitlines(keepends=True)
    own = "".join(row for row in take_entry(rows, name)).replace(f"[{name}", f"[my-{name}")
    path = tmp_path / "own.toml"
    path.write_text(own, encoding="utf-8")
    copy = load_catalog(extra=path)[f"my-{name}"]
    assert copy.model_copy(update={"name": name, "loras": SHIPPED[name].loras}) == SHIPPED[name]
    path.write_text(own.replace("description =", "colour = 1\ndescription =", 1), encoding="utf-8")
    with pytest.raises(CatalogError, match=rf"own\.toml: \[my-{name}\] colour: .*known are name, "):
        load_catalog(extra=path)


def take_entry(rows: list[str], name: str) -> list[str]:
    """The rows of a table and its own sub-tables."""
    heads = [index for index, row in enumerate(rows) if row.startswith("[")]
    end = next((index for index in heads if not rows[index].startswith((f"[{name}]", f"[{name}."))), len(rows))
    return rows[:end]


def test_the_shipped_file_names_no_revision_that_nobody_looked_up() -> None:
    tables = tomllib.loads(CATALOG_PATH.read_text(encoding="utf-8"))
    assert [name for name in PUBLISHED if "revision" in tables[name]] == []
