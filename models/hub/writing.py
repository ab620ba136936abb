"""Files that are whole or not there at all."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4


def write_whole(path: Path, text: str, by_way_of: Path | None = None) -> None:
    """Under a name of its own first, in `by_way_of` or beside it: nobody reads half of it, and two who write at once
    don't meet. Raises OSError."""
    new = (by_way_of or path.parent) / f".{path.name}.{uuid4().hex}.new"
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
