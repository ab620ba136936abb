"""The lock file: which commit of each repository is used, and what each of its files must be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from models.hub.errors import SourceError
from models.hub.writing import write_whole

LOCK_FILE = Path("fewstep.lock")


def is_safe_name(name: str) -> bool:
    """Whether a file of that name stays in the folder it is put into."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") for part in parts) and "\\" not in name and ":" not in name


def _stay_inside(name: str) -> str:
    if not is_safe_name(name):
        raise ValueError(f"{name!r} leads out of the repository")
    return name


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LockedFile(_Strict):
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class LockedRepository(_Strict):
    commit: str = Field(pattern="^[0-9a-f]{40}$")
    files: dict[Annotated[str, AfterValidator(_stay_inside)], LockedFile]


class Lock(_Strict):
    """By "owner/name", or "owner/name@revision" where the entry asks for a revision."""

    version: Literal[1] = 1
    repositories: dict[str, LockedRepository] = {}

    def with_files(self, key: str, commit: str, files: dict[str, LockedFile]) -> Lock:
        """Files of the same commit add up; another commit starts anew."""
        old = self.repositories.get(key)
        kept = old.files if old is not None and old.commit == commit else {}
        repository = LockedRepository(commit=commit, files={**kept, **files})
        return Lock(repositories={**self.repositories, key: repository})


def lock_key(repository: str, revision: str | None) -> str:
    return f"{repository}@{revision}" if revision else repository


def read_lock(path: Path) -> Lock:
    """An empty one where there is no file. Raises SourceError that names the file and the key."""
    try:
        return Lock.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Lock()
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SourceError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from error


def check_writable(path: Path) -> None:
    """Raises SourceError where `write_lock` would."""
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise SourceError(
            f"can't write the lock file {path}: its folder isn't there or isn't yours to write; FEWSTEP_LOCK_FILE"
            " names another"
        )


def write_lock(path: Path, lock: Lock) -> None:
    """Sorted, a line per value, and whole or not at all: it is made to be committed."""
    text = json.dumps(lock.model_dump(), indent=2, sort_keys=True) + "\n"
    try:
        write_whole(path, text)
    except OSError as error:
        raise SourceError(f"can't write the lock file {path}: {error.strerror}") from error


def add_to_lock(path: Path, key: str, repository: LockedRepository) -> None:
    """Adds to what the file holds by now: another pull may have written it since it was read. Raises SourceError."""
    from huggingface_hub.utils import WeakFileLock

    try:
        with WeakFileLock(path.with_name(f".{path.name}.guard")):
            write_lock(path, read_lock(path).with_files(key, repository.commit, repository.files))
    except OSError as error:
        raise SourceError(f"can't write the lock file {path}: {error.strerror}") from error
