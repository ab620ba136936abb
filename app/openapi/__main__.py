"""Writes the generated tables of a page anew: `python -m app.openapi docs/api.md`."""

from __future__ import annotations

import sys
from pathlib import Path

from app.main import create_app
from app.openapi.tables import fill_in, make_tables
from app.settings import GatewaySettings


def main(paths: list[str]) -> None:
    tables = make_tables(create_app(GatewaySettings(allow_anonymous=True)).openapi())
    for path in map(Path, paths):
        path.write_text(fill_in(path.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
