"""The catalog of servable models: data only, no torch, so the gateway can read it too.

One table per model in `models/catalog.toml`; adding a model whose family exists is adding a table. `specs.py` says what
a table may hold, `reading.py` how files become specs, `classes.py` what prompts of a class-conditional model may say.
"""

from models.catalog.classes import ClassNames, UnknownClassError
from models.catalog.reading import CATALOG_PATH, CatalogError, UnknownModelError, get_spec, load_catalog
from models.catalog.specs import (
    BUNDLED_PATH,
    MAX_LORA_WEIGHT,
    LoraSpec,
    ModelSpec,
    Range,
    SchedulerSpec,
    Size,
    StepRange,
    StyleLora,
)

__all__ = [
    "BUNDLED_PATH",
    "CATALOG_PATH",
    "MAX_LORA_WEIGHT",
    "CatalogError",
    "ClassNames",
    "LoraSpec",
    "ModelSpec",
    "Range",
    "SchedulerSpec",
    "Size",
    "StepRange",
    "StyleLora",
    "UnknownClassError",
    "UnknownModelError",
    "get_spec",
    "load_catalog",
]
