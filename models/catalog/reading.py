"""Catalog files: TOML tables become specs, with errors that name the file, the table and the key."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from models.catalog.specs import ModelSpec, StyleLora

CATALOG_PATH = Path(__file__).parent.with_name("catalog.toml")
LORAS = "loras"  # the table of style LoRAs, so no model's name
NAMED_BY_TABLES = ("name", LORAS)  # fields of a spec that no table gives itself

S = TypeVar("S", bound=BaseModel)


class CatalogError(Exception):
    """A catalog that can't be used: the message names the file, the key and what is allowed."""


class UnknownModelError(CatalogError):
    """No entry of that name; the message lists those there are."""

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(f"unknown model {name!r}: the catalog has {', '.join(known)}")
        self.name, self.known = name, known


def load_catalog(path: Path = CATALOG_PATH, extra: Path | None = None) -> dict[str, ModelSpec]:
    """All entries by name: those of `path`, then those of the user's own file `extra`, which may replace some.

    A LoRA goes with the entries of its own file and of those before it, not with what a later file puts in their place.
    Raises CatalogError.
    """
    models: dict[str, ModelSpec] = {}
    loras: dict[str, StyleLora] = {}
    for file in (path,) if extra is None else (path, extra):
        tables = _read(file)
        own_loras = _parse_all(file, f"{LORAS}.", StyleLora, _check_tables(file, LORAS, tables.pop(LORAS, {})))
        own_models = _parse_all(file, "", ModelSpec, _check_tables(file, "", tables))
        models |= own_models
        _check_lora_models(file, own_loras, models)
        loras = _made_for_others(loras, own_models) | own_loras
    return {name: _with_loras(spec, loras) for name, spec in models.items()}


def get_spec(catalog: Mapping[str, ModelSpec], name: str) -> ModelSpec:
    try:
        return catalog[name]
    except KeyError:
        raise UnknownModelError(name, sorted(catalog)) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CatalogError(f"{path}: {error}") from error


def _check_tables(path: Path, where: str, tables: Any) -> dict[str, Mapping[str, Any]]:
    if not isinstance(tables, dict):
        raise CatalogError(f"{path}: {where!r} must hold one table per LoRA")
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise CatalogError(f"{path}: {name!r} must be a table, one per {'LoRA' if where else 'model'}")
    return tables


def _parse_all(path: Path, prefix: str, kind: type[S], tables: Mapping[str, Mapping[str, Any]]) -> dict[str, S]:
    return {name: _parse(path, prefix, kind, name, table) for name, table in tables.items()}


def _parse(path: Path, prefix: str, kind: type[S], name: str, table: Mapping[str, Any]) -> S:
    if given := [key for key in NAMED_BY_TABLES if key in table]:
        raise CatalogError(f"{path}: [{prefix}{name}] {given[0]}: said by the names of tables, see [{LORAS}.NAME]")
    try:
        return kind.model_validate({"name": name, **table})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CatalogError(f"{path}: [{prefix}{name}] {key}: {_explain(first, kind)}") from error


def _explain(error: Any, kind: type[BaseModel]) -> str:
    """pydantic's words; of an unknown key also those that are known, of a wrong value also the value."""
    message: str = error["msg"]
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
        return f"{message}; known are {', '.join(kind.model_fields)}"
    value = error["input"]
    return f"{message}, got {value!r}" if isinstance(value, str | int | float) else message


def _check_lora_models(path: Path, loras: Mapping[str, StyleLora], models: Mapping[str, ModelSpec]) -> None:
    for name, lora in loras.items():
        if unknown := [model for model in lora.models if model not in models]:
            known = ", ".join(sorted(models))
            raise CatalogError(f"{path}: [{LORAS}.{name}] models: unknown model {unknown[0]!r}, there are {known}")
        if unfit := [model for model in lora.models if models[model].family == "consistency"]:
            raise CatalogError(
                f"{path}: [{LORAS}.{name}] models: {unfit[0]} is a consistency model, which takes no LoRA"
            )


def _made_for_others(loras: Mapping[str, StyleLora], models: Collection[str]) -> dict[str, StyleLora]:
    """Without `models`, whose weights are others now."""
    left = {name: [model for model in lora.models if model not in models] for name, lora in loras.items()}
    return {name: lora.model_copy(update={"models": left[name]}) for name, lora in loras.items()}


def _with_loras(spec: ModelSpec, loras: Mapping[str, StyleLora]) -> ModelSpec:
    """With the style LoRAs that name it."""
    own = {name: lora for name, lora in loras.items() if spec.name in lora.models}
    return spec.model_copy(update={"loras": own}) if own else spec
