"""fewstep models: what can be served, and whether its files are here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from commands.console import fail, format_bytes, one_line_errors, output, say

if TYPE_CHECKING:
    from rich.console import Console

    from models.catalog import ModelSpec
    from models.hub.inventory import HeldFile, Holding
    from workers.settings import WorkerSettings

models_app = typer.Typer(help="What can be served, and getting its files.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="An entry of the catalog; see: fewstep models list")]
Names = Annotated[list[str], typer.Argument(help="Entries of the catalog; see: fewstep models list")]


@models_app.command("list")
def list_models() -> None:
    """The catalog: names, steps, sizes, licences, and whether the files are on this machine.

    Example: fewstep models list
    """
    from rich.table import Column, Table

    from models.hub.inventory import holdings_of

    settings, catalog, _ = _load()
    with _source_errors():
        held = {name: holdings_of(spec, settings.lock_file) for name, spec in catalog.items()}
    columns = [Column(heading, no_wrap=True) for heading in ("name", "family", "steps")]
    others = [Column(heading, overflow="fold") for heading in ("sizes", "files", "tested with", "licence")]
    table = Table(*columns, *others, box=None, pad_edge=False)
    for spec in catalog.values():
        tested_with = spec.tested_with.removesuffix(" weights")
        table.add_row(
            spec.name, spec.family, _steps(spec), _few_sizes(spec), _state(held[spec.name]), tested_with, spec.license
        )
    output().print(table)


def _state(holdings: list[Holding]) -> str:
    here = [holding.place is not None for holding in holdings]
    if all(here) and all(holding.need.source.startswith("bundled:") for holding in holdings):
        return "bundled"
    return "here" if all(here) else "partly here" if any(here) else "not here"


@models_app.command()
def show(name: Name) -> None:
    """Everything about one entry: rules, licence, where its parts come from, and which files are here.

    Example: fewstep models show sdxl-turbo
    """
    from rich.table import Table

    from models.hub.inventory import files_of, holdings_of
    from models.hub.lockfile import read_lock

    settings, _, (spec,) = _load([name])
    with _source_errors():
        lock = read_lock(settings.lock_file)
        screen = output()
        facts = Table.grid(padding=(0, 2))
        for key, value in _facts(spec):
            facts.add_row(key, value)
        screen.print(facts)
        for holding in holdings_of(spec, settings.lock_file):
            files = files_of(holding.need, lock) if holding.is_on_hub else []
            _show_holding(screen, holding, files)


def _facts(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    yield from [("name", spec.name), ("description", spec.description), ("family", spec.family)]
    yield from [("steps", _steps(spec)), ("sizes", _sizes(spec))]
    yield "warmed", ", ".join(f"{width}x{height}" for width, height in spec.warm_sizes)
    scale = spec.guidance_scale
    yield "guidance", f"{spec.guidance}, scale {scale.default:g} ({scale.min:g} to {scale.max:g})"
    yield "schedulers", ", ".join(spec.schedulers) + f" (default {spec.default_scheduler})"
    yield "on a GPU", spec.dtype + (f", about {spec.memory_gib:g} GiB" if spec.memory_gib else "")
    yield "tested with", spec.tested_with
    yield "licence", " · ".join(part for part in (spec.license, spec.license_note, spec.license_url) if part)
    for lora in spec.loras.values():
        words = (lora.description, lora.license, lora.license_note)
        yield f"LoRA {lora.name}", " · ".join(part for part in words if part)
    if spec.deprecated:
        yield "deprecated", f"{spec.deprecated}" + (f", ends {spec.sunset}" if spec.sunset else "")


def _show_holding(screen: Console, holding: Holding, files: list[HeldFile]) -> None:
    need, place = holding.need, holding.place
    revision = (place.revision if place else None) or need.revision
    screen.print(f"\n[bold]{need.part}[/]: {need.source}" + (f" at {revision}" if revision else ""), soft_wrap=True)
    if place is None:
        screen.print(f"  {holding.problem.removeprefix(f'{need.model}: ')}", style="yellow", soft_wrap=True)
    elif not holding.is_on_hub:
        screen.print(f"  {place.path}", soft_wrap=True)
    for file in files:
        size = "size unknown" if file.size is None else format_bytes(file.size)
        screen.print(f"  {file.name}  {size}  {'here' if file.is_here else 'not here'}", soft_wrap=True)


@models_app.command()
def pull(
    names: Names,
    update: Annotated[
        bool, typer.Option("--update", help="Take the newest commits, not those of the lock file.")
    ] = False,
) -> None:
    """Downloads what the entries need, checks it, and notes commits and checksums in the lock file.

    A download that was broken off goes on where it ended. A second pull takes the commits of the lock file
    (FEWSTEP_LOCK_FILE).

    Example: fewstep models pull sdxl-turbo
    """
    from commands.pulling import pull_models

    settings, catalog, specs = _load(names)
    with _source_errors():
        pull_models(specs, list(catalog.values()), settings.lock_file, update=update)


@models_app.command()
def check(names: Names) -> None:
    """Loads each model as a worker would, draws one picture for each of its rules, and prints what that took.

    Ends with status 1 if a picture isn't sound.

    Example: fewstep models check mini-lcm
    """
    from commands.checking import check_models

    settings, _, specs = _load(names)
    with one_line_errors():
        check_models(specs, settings)


@models_app.command()
def remove(names: Names) -> None:
    """Deletes from the Hub's cache what no other entry needs that is here.

    Folders of your own and the bundled models stay.

    Example: fewstep models remove sdxl-turbo
    """
    from models.hub.inventory import remove as remove_files

    settings, catalog, specs = _load(names)
    others = [spec for spec in catalog.values() if spec.name not in names]
    with _source_errors():
        num_bytes = remove_files(specs, others, settings.lock_file)
    for spec in specs:
        _say_what_stays(spec)
    say(f"{format_bytes(num_bytes)} freed")


def _say_what_stays(spec: ModelSpec) -> None:
    from models.hub.needs import needs_of
    from models.sources import local_path

    for source in dict.fromkeys(need.source for need in needs_of(spec)):
        if source.startswith("bundled:"):
            say(f"{spec.name}: {source} ships with fewstep and stays")
        elif local_path(source) is not None:
            say(f"{spec.name}: {source} is yours and stays")


@contextmanager
def _source_errors() -> Iterator[None]:
    """Of files that can't be had."""
    from models.hub.errors import SourceError

    try:
        with one_line_errors():
            yield
    except SourceError as error:
        fail(str(error), status=1)


def _load(names: Sequence[str] = ()) -> tuple[WorkerSettings, dict[str, ModelSpec], list[ModelSpec]]:
    """Settings, the whole catalog, and the entries of these names."""
    from models.catalog import get_spec, load_catalog
    from workers.settings import WorkerSettings

    with one_line_errors():
        settings = WorkerSettings.load()
        catalog = load_catalog(settings.catalog, settings.extra_catalog)
        specs = [get_spec(catalog, name) for name in dict.fromkeys(names)]
    return settings, catalog, specs


def _steps(spec: ModelSpec) -> str:
    steps = spec.num_inference_steps
    return f"{steps.default} ({steps.min}-{steps.max})"


def _few_sizes(spec: ModelSpec) -> str:
    (width, height), num_others = spec.default_size, len(spec.sizes) - 1
    return f"{width}x{height}" + (f" + {num_others}" if num_others else "")


def _sizes(spec: ModelSpec) -> str:
    return ", ".join(f"{width}x{height}" for width, height in spec.sizes)
