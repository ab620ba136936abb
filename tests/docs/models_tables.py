"""The tables of docs/models.md as the catalog has them: python -m tests.docs.models_tables prints them anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from models.catalog import ModelSpec, Range, StepRange, load_catalog


def served_rows() -> Iterator[str]:
    """What can be served."""
    yield row("model", "weights", "steps", "guidance", "GiB", "tested with")
    yield row("---", "---", "---", "---", "---:", "---")
    for spec in load_catalog().values():
        memory = "" if spec.memory_gib is None else str(spec.memory_gib)
        steps, guidance = describe(spec.num_inference_steps), describe(spec.guidance_scale)
        yield row(f"`{spec.name}`", weights(spec), steps, guidance, memory, spec.tested_with)


def size_rows() -> Iterator[str]:
    yield row("models", "sizes, the default first")
    yield row("---", "---")
    names: dict[str, list[str]] = {}
    for spec in load_catalog().values():
        sizes = ", ".join(f"{width}×{height}" for width, height in spec.sizes)
        names.setdefault(sizes, []).append(f"`{spec.name}`")
    for sizes, models in names.items():
        yield row(", ".join(models), sizes)


def scheduler_rows() -> Iterator[str]:
    yield row("models", "schedulers, the default first")
    yield row("---", "---")
    names: dict[str, list[str]] = {}
    for spec in load_catalog().values():
        others = [name for name in spec.schedulers if name != spec.default_scheduler]
        schedulers = ", ".join(f"`{name}`" for name in (spec.default_scheduler, *others))
        names.setdefault(schedulers, []).append(f"`{spec.name}`")
    for schedulers, models in names.items():
        yield row(", ".join(models), schedulers)


def licence_rows() -> Iterator[str]:
    yield row("model", "licence", "note")
    yield row("---", "---", "---")
    for spec in load_catalog().values():
        licence = f"[{spec.license}]({spec.license_url})" if spec.license_url else spec.license
        yield row(f"`{spec.name}`", licence, spec.license_note)


def weights(spec: ModelSpec) -> str:
    parts = [spec.source, *([spec.unet] if spec.unet else []), *([spec.lora.source] if spec.lora else [])]
    return " + ".join(part.removeprefix("bundled:") for part in parts)


def describe(limits: Range | StepRange) -> str:
    only = limits.min == limits.max
    return f"{limits.default:g}" if only else f"{limits.default:g} ({limits.min:g} to {limits.max:g})"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


TABLES = (served_rows, size_rows, scheduler_rows, licence_rows)


def write(tables: Sequence[Iterator[str]]) -> str:
    return "\n\n".join("\n".join(table) for table in tables)


if __name__ == "__main__":
    print(write([table() for table in TABLES]))
