"""What a running worker takes over when the catalog is read again, and what only a new start can change."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from models.catalog import ModelSpec

logger = logging.getLogger(__name__)

# What the networks in memory, their recordings and the proven batches were made from.
FIXED = frozenset({
    "family", "source", "revision", "variant", "dtype", "config", "unet", "vae", "tiny_vae", "safety_checker", "lora",
    "classes", "guidance", "warm_sizes", "max_batch_size",
})  # fmt: skip


def take_over(specs: Mapping[str, ModelSpec], catalog: Mapping[str, ModelSpec]) -> dict[str, ModelSpec]:
    """`specs` with all that a running worker can change as `catalog` says it now; says of the rest that it can't."""
    return {name: _take_over(spec, catalog.get(name)) for name, spec in specs.items()}


def _take_over(spec: ModelSpec, now: ModelSpec | None) -> ModelSpec:
    if now is None:
        logger.warning("%s is gone from the catalog; this worker keeps it until it is started again", spec.name)
        return spec
    changed = {field for field in ModelSpec.model_fields if getattr(spec, field) != getattr(now, field)}
    if fixed := sorted(changed & FIXED):
        logger.warning(
            "%s: %s of the catalog changed: that needs a new start of this worker", spec.name, ", ".join(fixed)
        )
    if taken := sorted(changed - FIXED):
        logger.info("%s: the catalog was read again, changed: %s", spec.name, ", ".join(taken))
    return spec.model_copy(update={field: getattr(now, field) for field in changed - FIXED})
