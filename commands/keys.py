"""fewstep keys: who may use a gateway."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.console import one_line_errors, output, say

if TYPE_CHECKING:
    from app.access.keys import KeyRecord

keys_app = typer.Typer(help="Who may use a gateway: API keys in a file of hashes.", no_args_is_help=True)

KeysFile = Annotated[Path, typer.Option("--file", "-f", envvar="FEWSTEP_API_KEYS_FILE", help="The file of the keys.")]


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What you will know it by.")],
    file: KeysFile,
    weight: Annotated[int | None, typer.Option(help="Its share beside other keys, 1 to 100; 1 if none.")] = None,
    requests: Annotated[int | None, typer.Option("--requests-per-minute", help="Unlimited if none.")] = None,
    images: Annotated[int | None, typer.Option("--images-per-minute", help="Unlimited if none.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model it may use, once for each; all if none.")] = None,
    lane: Annotated[list[str] | None, typer.Option(help="live or api; both if none.")] = None,
) -> None:
    """Makes a key and prints it, this once. The file gets only its hash; a running gateway reads it within a second.

    Example: fewstep keys create shop --file keys.toml --images-per-minute 120
    """
    from app.access.key_file import add_key, format_entry, make_key, new_record

    with one_line_errors():
        key_id, key = make_key()
        record = new_record(
            key,
            name=name,
            weight=weight,
            max_requests_per_minute=requests,
            max_images_per_minute=images,
            models=_check_models(model or []),
            lanes=lane,
            created=datetime.date.today(),
        )
        add_key(file, record, key_id)
    print(key)
    say(f"{file}: has key {key_id}. It is shown only now: keep it.")
    say(f"For FEWSTEP_API_KEYS: {format_entry(key_id, record)}")


@keys_app.command("list")
def list_keys(file: KeysFile) -> None:
    """The keys of a file: ids, names, rates.

    Example: fewstep keys list --file keys.toml
    """
    from rich.table import Column, Table

    from app.access.keys import parse_file

    with one_line_errors():
        records = parse_file(file)
    headings = ("name", "weight", "requests/min", "images/min", "models", "lanes", "created")
    table = Table(Column("id", no_wrap=True, min_width=12), *headings, box=None, pad_edge=False)
    for key_id, record in records.items():
        table.add_row(key_id, *_show_record(record))
    output().print(table)


def _show_record(record: KeyRecord) -> Iterator[str]:
    yield from (record.name, str(record.weight))
    for rate in (record.max_requests_per_minute, record.max_images_per_minute):
        yield "unlimited" if rate is None else str(rate)
    yield ", ".join(sorted(record.models)) if record.models else "all"
    yield ", ".join(sorted(record.lanes))
    yield str(record.created or "")


@keys_app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="Its id: the part between fs_ and the next underscore.")], file: KeysFile
) -> None:
    """Takes a key out of the file; a running gateway refuses it within a second and ends its live sockets.

    Example: fewstep keys revoke 3f0a9c51b2de --file keys.toml
    """
    from app.access.key_file import remove_key

    with one_line_errors():
        record = remove_key(file, key_id)
    say(f"{file}: key {key_id} {record.name} is revoked")


def _check_models(names: list[str]) -> list[str]:
    from app.settings import GatewaySettings
    from models.catalog import get_spec, load_catalog

    settings = GatewaySettings.load()
    catalog = load_catalog(settings.catalog, settings.extra_catalog)
    return [get_spec(catalog, name).name for name in names]
