"""What is on this machine of the catalog's entries, and taking it away again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from models.catalog import ModelSpec
from models.hub.cache import Snapshot, cached_commit, delete, delete_partial, snapshots_of
from models.hub.lockfile import Lock, lock_key, read_lock
from models.hub.needs import Need, needs_of, select
from models.sources import Place, SourceError, local_path, locate


@dataclass(frozen=True, slots=True)
class Holding:
    """One part of an entry: its place where it is here, else why not."""

    need: Need
    place: Place | None
    problem: str = ""

    @property
    def is_on_hub(self) -> bool:
        return local_path(self.need.source) is None


@dataclass(frozen=True, slots=True)
class HeldFile:
    """Of a repository on the Hub. The size is known of what was pulled once."""

    name: str
    size: int | None
    is_here: bool


def holdings_of(spec: ModelSpec, lock_file: Path) -> list[Holding]:
    """Raises SourceError for a damaged lock file, which would make everything look as if it weren't here."""
    read_lock(lock_file)
    return [_look(spec, need, lock_file) for need in needs_of(spec)]


def _look(spec: ModelSpec, need: Need, lock_file: Path) -> Holding:
    try:
        return Holding(need, locate(spec, need.part, lock_file=lock_file, only_look=True))
    except SourceError as error:
        return Holding(need, None, str(error))


def files_of(need: Need, lock: Lock) -> list[HeldFile]:
    """What the part takes of its repository, as far as the lock file or the cache knows it."""
    locked = lock.repositories.get(lock_key(need.source, need.revision))
    commit = locked.commit if locked else cached_commit(need.source, need.revision)
    if commit is None:
        return []
    snapshot = Snapshot(need.source, commit)
    known = locked.files if locked else {}
    names = select(need, snapshot.names() | known.keys(), snapshot.read).names
    return [_held(snapshot, name, known[name].size if name in known else None) for name in sorted(names)]


def _held(snapshot: Snapshot, name: str, size: int | None) -> HeldFile:
    is_here = snapshot.has_size(name, size)
    return HeldFile(name, snapshot.path(name).stat().st_size if is_here else size, is_here)


def remove(specs: Iterable[ModelSpec], others: Iterable[ModelSpec], lock_file: Path) -> int:
    """Deletes from the Hub's cache what `specs` have there and none of `others` needs: of these only those count that
    are here as a whole. Returns the bytes freed."""
    kept = _hub_needs(spec for spec in others if all(holding.place for holding in holdings_of(spec, lock_file)))
    doomed = _hub_needs(specs)
    num_freed = delete(_cached_files(doomed) - _cached_files(kept))
    unshared = {need.source for need in doomed} - {need.source for need in kept}
    return num_freed + sum(map(delete_partial, unshared))


def _hub_needs(specs: Iterable[ModelSpec]) -> list[Need]:
    return [need for spec in specs for need in needs_of(spec) if local_path(need.source) is None]


def _cached_files(needs: Iterable[Need]) -> set[Path]:
    """At every commit, since an update leaves the files of the one before."""
    return {
        snapshot.path(name)
        for need in needs
        for snapshot in snapshots_of(need.source)
        for name in select(need, snapshot.names(), snapshot.read).names
    }
