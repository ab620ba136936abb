"""API keys: what a key is, where keys are kept, and who comes with one.

A key reads `fs_<id>_<secret>`. Only SHA-256 of it is kept. A slow hash, as passwords need, would add nothing: the
secret is 256 random bits, which nobody can guess or list, however fast the hash is.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import hmac
import logging
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar
from urllib.parse import parse_qs

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.access.callers import Caller
from app.errors import Unauthorized
from app.settings import GatewaySettings
from broker.messages import Lane
from broker.settings import SettingsError

RELOAD_S = 1.0
ALL_LANES: frozenset[Lane] = frozenset({"live", "api"})
ENTRIES, FILE = "FEWSTEP_API_KEYS", "FEWSTEP_API_KEYS_FILE"

_ID = re.compile(r"[0-9a-f]{12}")
_NO_KEY = "0" * 64  # no text has this hash, as far as anyone knows

log = logging.getLogger(__name__)

Rate = Annotated[int, Field(ge=1, le=100_000)]


class KeyRecord(BaseModel):
    """What is kept of a key. Rates are per minute, None means unlimited; `models` None means all."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    lists: ClassVar[frozenset[str]] = frozenset({"models", "lanes"})

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    name: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{0,100}$")] = ""
    weight: Annotated[int, Field(ge=1, le=100)] = 1
    max_requests_per_minute: Rate | None = None
    max_images_per_minute: Rate | None = None
    models: Annotated[frozenset[str], Field(min_length=1)] | None = None
    lanes: Annotated[frozenset[Lane], Field(min_length=1)] = ALL_LANES
    created: datetime.date | None = None

    def to_caller(self, key_id: str) -> Caller:
        return Caller(
            owner=key_id,
            weight=self.weight,
            models=self.models,
            lanes=self.lanes,
            max_requests_per_minute=self.max_requests_per_minute,
            max_images_per_minute=self.max_images_per_minute,
        )


Records = Mapping[str, KeyRecord]


def hash_key(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class KeyRing:
    """The keys of FEWSTEP_API_KEYS, and those of FEWSTEP_API_KEYS_FILE as it is now.

    A file that can't be used keeps the keys as they were and says so in the log. Raises SettingsError when there is
    nothing to keep yet: at the start.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self.is_used = settings.has_keys
        self._fixed = parse_entries(settings.api_keys or "")
        self._path = settings.api_keys_file
        self._seen = _look_at(self._path)
        self._records = self._collect()
        self._changed = asyncio.Event()
        if self.is_used and not self._records and not settings.allow_anonymous:
            raise SettingsError(f"{FILE}={str(self._path)!r} holds no key: make one with fewstep keys create")

    def find(self, text: str) -> Caller:
        """Whose key this is. Raises Unauthorized; an unknown id costs the same comparison as a wrong secret."""
        key_id = text.split("_", 2)[1] if text.count("_") >= 2 else ""
        record = self._records.get(key_id)
        is_right = hmac.compare_digest(hash_key(text), record.sha256 if record else _NO_KEY)
        if record is None or not is_right:
            raise Unauthorized("the API key is not valid: it is wrong, or it was revoked")
        return record.to_caller(key_id)

    def get(self, key_id: str) -> Caller:
        """The caller with this key id as the keys are now. Raises Unauthorized where it was revoked."""
        if (record := self._records.get(key_id)) is None:
            raise Unauthorized("the API key was revoked")
        return record.to_caller(key_id)

    async def changed(self) -> None:
        """Returns after the next change of the keys."""
        await self._changed.wait()

    async def watch_forever(self) -> None:
        """Looks at the file every second: a key that was made or revoked counts without a restart."""
        while True:
            await asyncio.sleep(RELOAD_S)
            self.reload()

    def reload(self) -> None:
        """Reads the file if it has changed."""
        if (seen := _look_at(self._path)) == self._seen:
            return
        self._seen = seen
        try:
            self._records = self._collect()
        except SettingsError as error:
            log.error("%s; the keys stay as they were", error)
            return
        log.info("the API keys have changed: %d are valid", len(self._records))
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _collect(self) -> Records:
        return (parse_file(self._path) if self._path else {}) | self._fixed


def _look_at(path: Path | None) -> tuple[int, int, int] | None:
    """What tells one version of the file from the next; None while it is missing."""
    try:
        status = path.stat() if path else None
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_ino, status.st_size) if status else None


def parse_file(path: Path) -> dict[str, KeyRecord]:
    """The keys of a file: TOML, one table per key, headed by its id. Raises SettingsError that names the fault.

    A file of no bytes is a fault: so it looks to a reader while somebody writes it in place.
    """
    where = f"{FILE}={str(path)!r}"
    try:
        content = path.read_bytes()
        tables = tomllib.loads(content.decode())
    except OSError as error:
        raise SettingsError(f"{where}: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"{where}: {error}") from error
    if not content:
        raise SettingsError(f"{where}: the file is empty")
    return {key_id: _parse_record(where, key_id, table) for key_id, table in tables.items()}


def parse_entries(text: str) -> dict[str, KeyRecord]:
    """The keys of an environment variable: `<id>:<sha256>?weight=2&models=a&models=b`, several separated by commas or
    spaces. Raises SettingsError, without the value: somebody may have put a key there."""
    return dict(_parse_entry(entry) for entry in re.split(r"[,\s]+", text) if entry)


def _parse_entry(entry: str) -> tuple[str, KeyRecord]:
    head, separator, query = entry.partition("?")
    key_id, _, sha256 = head.partition(":")
    try:
        given = parse_qs(query, strict_parsing=True, keep_blank_values=True) if separator else {}
    except ValueError as error:
        raise SettingsError(f"{ENTRIES}: after the ? of a key come fields as in weight=2&lanes=api") from error
    fields = {
        name: values if name in KeyRecord.lists or len(values) > 1 else values[0] for name, values in given.items()
    }
    return key_id, _parse_record(ENTRIES, key_id, {"sha256": sha256, **fields})


def _parse_record(where: str, key_id: str, fields: Any) -> KeyRecord:
    if not _ID.fullmatch(key_id) or not isinstance(fields, dict):
        raise SettingsError(
            f"{where}: a key is named by the 12 hexadecimal digits of its id, as `fewstep keys` writes it"
        )
    try:
        return KeyRecord.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise SettingsError(f"{where}: key {key_id}: {name}: {first['msg']}") from error
