"""What all commands say and how they fail: one line on stderr."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console

from supervisor import EX_CONFIG

WIDE = 200
console = Console(stderr=True, emoji=False)


def output() -> Console:
    """stdout. Where it is no terminal, tables get room enough to keep each row on one line."""
    is_sized = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if is_sized else WIDE, highlight=False, emoji=False)


def say(message: str, style: str | None = None) -> None:
    """As it is: no markup, no colours for numbers, no line breaks of our own."""
    console.print(message, style=style, highlight=False, markup=False, soft_wrap=True)


def fail(message: str, status: int = EX_CONFIG) -> NoReturn:
    say(f"fewstep: {message}", "bold red")
    raise typer.Exit(status)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Of what somebody typed, set or wrote into a file."""
    from pydantic import ValidationError

    from broker.settings import SettingsError
    from models.catalog import CatalogError

    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        fail(f"{'.'.join(str(part) for part in first['loc'])}={first['input']!r}: {first['msg']}")
    except (SettingsError, CatalogError, OSError) as error:
        fail(str(error))


def configure_logging() -> None:
    level = os.environ.get("FEWSTEP_LOG_LEVEL", "info").upper()
    logging.basicConfig(
        level=level if level in logging.getLevelNamesMapping() else "INFO",
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)


def hush_libraries() -> None:
    """Their progress bars and hints would drown ours; errors still show."""
    import diffusers
    import transformers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def format_bytes(num_bytes: float) -> str:
    """As shops and the Hub count: 1 GB is 1000 MB."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
