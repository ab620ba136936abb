"""Which files of a repository an entry of the catalog needs, and nothing more.

Names in, names out: no disk, no network. Safetensors only; the entry's variant where a network has one, else the plain
file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from models.catalog import ModelSpec

MODEL_INDEX = "model_index.json"
NETWORKS = ("unet", "vae", "tiny_vae")
EXTRAS = frozenset({"safety_checker", "image_encoder"})  # which a pipeline can do without
STEMS = ("diffusion_pytorch_model", "model")
CONFIG_SUFFIXES = (".json", ".txt", ".model")
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
WEIGHTLESS = ("Tokenizer", "TokenizerFast", "Scheduler", "ImageProcessor", "FeatureExtractor")

Read = Callable[[str], bytes | None]


@dataclass(frozen=True, slots=True)
class Need:
    """What one part of an entry takes from its source.

    `part` is the catalog's key: source, config, unet, vae, tiny_vae, safety_checker, lora or "loras.<name>".
    """

    model: str
    part: str
    source: str
    kind: Literal["pipeline", "configs", "network", "safety", "file"]
    revision: str | None = None
    variant: str | None = None
    replaced: frozenset[str] = frozenset()
    weight_name: str = ""


@dataclass(frozen=True, slots=True)
class Selection:
    """The files to have, what there is none of (in words), and the folder that a single network lies in."""

    names: frozenset[str] = frozenset()
    lacking: tuple[str, ...] = ()
    folder: str = ""

    def __add__(self, other: Selection) -> Selection:
        return Selection(self.names | other.names, self.lacking + other.lacking, self.folder)


def needs_of(spec: ModelSpec) -> list[Need]:
    """Of every part that the entry names."""
    return [need_of(spec, part) for part in _parts_of(spec)]


def need_of(spec: ModelSpec, part: str) -> Need:
    """Revision and variant are those of the entry's own source; other networks share its variant."""
    if part == "source":
        replaced = EXTRAS | {name for name in ("unet", "vae") if getattr(spec, name)}
        return Need(spec.name, part, spec.source, "pipeline", spec.revision, spec.variant, replaced=replaced)
    if part == "lora" or part.startswith("loras."):
        lora = spec.lora if part == "lora" else spec.loras[part.removeprefix("loras.")]
        assert lora is not None
        return Need(spec.name, part, lora.source, "file", weight_name=lora.weight_name)
    source = getattr(spec, part)
    revision = spec.revision if source == spec.source else None
    if part == "config":
        return Need(spec.name, part, source, "configs", revision, replaced=EXTRAS)
    if part == "safety_checker":
        variant = spec.variant if source == spec.source else None
        return Need(spec.name, part, source, "safety", revision, variant)
    return Need(spec.name, part, source, "network", revision, spec.variant)


def _parts_of(spec: ModelSpec) -> Iterator[str]:
    yield "source"
    yield from (part for part in ("config", *NETWORKS, "safety_checker", "lora") if getattr(spec, part))
    yield from (f"loras.{name}" for name in spec.loras)


def select(need: Need, names: Collection[str], read: Read) -> Selection:
    """Of the repository's `names`, those that `need` takes. `read` gives the bytes of an index, or None without it."""
    match need.kind:
        case "pipeline" | "configs":
            return _select_pipeline(need, names, read)
        case "safety":
            checker = _select_network("safety_checker", need.variant, names, read)
            return checker + _select_configs("feature_extractor", names)
        case "network":
            return _select_one_network(need, names, read)
        case "file":
            return _select_file(need.weight_name, names)


def _select_pipeline(need: Need, names: Collection[str], read: Read) -> Selection:
    index = _read_json(MODEL_INDEX, names, read)
    if index is None:
        return Selection(lacking=(MODEL_INDEX,))
    selection = Selection(frozenset({MODEL_INDEX}))
    for component, class_name in _components(index):
        if component in need.replaced:
            continue
        if need.kind == "configs" or class_name.endswith(WEIGHTLESS):
            selection += _select_configs(component, names)
        else:
            selection += _select_network(component, need.variant, names, read)
    return selection


def _components(index: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A component that the pipeline has no use for stands there as [null, null]."""
    for name, value in sorted(index.items()):
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str):
            yield name, value[1]


def _select_one_network(need: Need, names: Collection[str], read: Read) -> Selection:
    """At the repository's root, or in the folder that a pipeline keeps it in."""
    folder = "" if "config.json" in names else {"tiny_vae": "vae"}.get(need.part, need.part)
    selection = _select_network(folder, need.variant, names, read)
    return Selection(selection.names, selection.lacking, folder)


def _select_network(folder: str, variant: str | None, names: Collection[str], read: Read) -> Selection:
    weights = _select_weights(folder, variant, names, read)
    config = _join(folder, "config.json")
    return weights + (Selection(frozenset({config})) if config in names else Selection(lacking=(config,)))


def _select_configs(folder: str, names: Collection[str]) -> Selection:
    configs = {name for name in _within(folder, names) if name.endswith(CONFIG_SUFFIXES) and ".index." not in name}
    return Selection(frozenset(configs)) if configs else Selection(lacking=(f"{folder}/*.json",))


def _select_weights(folder: str, variant: str | None, names: Collection[str], read: Read) -> Selection:
    for infix in [f".{variant}", ""] if variant else [""]:
        for stem in STEMS:
            if (single := _join(folder, f"{stem}{infix}.safetensors")) in names:
                return Selection(frozenset({single}))
            if (index := _join(folder, f"{stem}.safetensors.index{infix}.json")) in names:
                return _select_shards(index, names, read)
    pickles = sorted(name for name in _within(folder, names) if name.endswith(PICKLE_SUFFIXES))
    only = f" (only {pickles[0]}, a pickle, which is never loaded)" if pickles else ""
    return Selection(lacking=(f"{_join(folder, '*.safetensors')}{only}",))


def _select_shards(index: str, names: Collection[str], read: Read) -> Selection:
    content = _read_json(index, names, read)
    if content is None or not isinstance(content.get("weight_map"), dict):
        return Selection(lacking=(index,))
    folder = str(PurePosixPath(index).parent)
    shards = {_join("" if folder == "." else folder, str(shard)) for shard in content["weight_map"].values()}
    lacking = tuple(sorted(shards.difference(names)))
    return Selection(frozenset(shards.intersection(names) | {index}), lacking)


def _select_file(weight_name: str, names: Collection[str]) -> Selection:
    if weight_name in names:
        return Selection(frozenset({weight_name}))
    others = sorted(name for name in names if name.endswith(".safetensors"))
    return Selection(lacking=(f"{weight_name} (it has {', '.join(others[:5]) or 'no safetensors file'})",))


def _read_json(name: str, names: Collection[str], read: Read) -> dict[str, Any] | None:
    content = read(name) if name in names else None
    try:
        value = json.loads(content) if content is not None else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _within(folder: str, names: Collection[str]) -> Iterator[str]:
    """Those that lie in the folder itself, not in one below it."""
    for name in names:
        parent, _, last = name.rpartition("/")
        if parent == folder and not last.startswith("."):
            yield name


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
