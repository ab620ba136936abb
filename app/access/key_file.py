"""The keys file as `fewstep keys` writes it: a table is added or taken out, everything else stays as it was."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

from app.access.keys import KeyRecord, hash_key, parse_file
from broker.settings import SettingsError

HEADER = "# API keys of fewstep, as hashes. `fewstep keys create`, `list` and `revoke` look after this file.\n"


def make_key() -> tuple[str, str]:
    """A new id, and the key that carries it: `fs_<id>_<256 random bits>`."""
    key_id = secrets.token_hex(6)
    return key_id, f"fs_{key_id}_{secrets.token_urlsafe(32)}"


def add_key(path: Path, record: KeyRecord, key_id: str) -> None:
    """Raises SettingsError or OSError."""
    with _locked(path):
        records = parse_file(path) if path.exists() else {}
        text = f"{_read(path).rstrip()}\n\n{format_table(key_id, record)}"
        _write(path, text, records | {key_id: record})


def remove_key(path: Path, key_id: str) -> KeyRecord:
    """The record of the key that was taken out. Raises SettingsError or OSError."""
    with _locked(path):
        records = parse_file(path)
        if key_id not in records:
            known = ", ".join(f"{known} {records[known].name}".rstrip() for known in records) or "none"
            raise SettingsError(f"there is no key {key_id!r}; {str(path)!r} has: {known}")
        removed = records.pop(key_id)
        _write(path, _without_table(_read(path), key_id), records)
    return removed


def format_table(key_id: str, record: KeyRecord) -> str:
    """One key as a table of the file. What is as by default is left out."""
    return "\n".join((f"[{key_id}]", *(f"{name} = {value}" for name, value in _shown(record)), ""))


def format_entry(key_id: str, record: KeyRecord) -> str:
    """One key as FEWSTEP_API_KEYS takes it."""
    fields = record.model_dump(mode="json", exclude_defaults=True, exclude={"sha256"})
    pairs = {name: sorted(value) if isinstance(value, list) else value for name, value in fields.items()}
    query = urlencode(pairs, doseq=True)
    return f"{key_id}:{record.sha256}" + (f"?{query}" if query else "")


def new_record(key: str, **fields: object) -> KeyRecord:
    """Raises pydantic's ValidationError."""
    given = {name: value for name, value in fields.items() if value not in (None, [], ())}
    return KeyRecord.model_validate({"sha256": hash_key(key), **given})


def _shown(record: KeyRecord) -> Iterator[tuple[str, str]]:
    for name, value in record.model_dump(exclude_defaults=True).items():
        match value:
            case str():
                yield name, json.dumps(value, ensure_ascii=False)
            case frozenset():
                yield name, json.dumps(sorted(value), ensure_ascii=False)
            case _:
                yield name, str(value)


def _without_table(text: str, key_id: str) -> str:
    """Without the heading and the lines up to the next blank line or heading."""
    return re.sub(rf"^\[{key_id}\][^\n]*\n(?:(?!\[)[^\n]*\S[^\n]*\n?)*\n?", "", text, flags=re.MULTILINE)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return HEADER


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time. The folder carries the lock, since the file itself is replaced."""
    folder = os.open(path.resolve().parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write(path: Path, text: str, records: dict[str, KeyRecord]) -> None:
    """Replaces the file at once, readable for its owner alone. `records` is what the text must say."""
    target = path.resolve()
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)  # with mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if not _says(Path(name), records):
            raise SettingsError(f"{str(path)!r} is laid out in a way that can't be changed safely: edit it by hand")
        _keep_owner(target, name)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _says(path: Path, records: dict[str, KeyRecord]) -> bool:
    try:
        return parse_file(path) == records
    except SettingsError:
        return False


def _keep_owner(target: Path, name: str) -> None:
    """Where root looks after the file of another user, that user must still be able to read it."""
    if target.exists() and target.stat().st_uid != os.getuid():
        os.chown(name, target.stat().st_uid, target.stat().st_gid)
