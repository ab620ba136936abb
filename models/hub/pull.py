"""From what an entry needs to files in the cache, at the commit that the lock file names."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace

from models.hub.cache import Digest, digest_of
from models.hub.errors import SourceError
from models.hub.lockfile import Lock, LockedFile, LockedRepository, lock_key
from models.hub.needs import Need, select
from models.hub.remote import Listing, RemoteFile, download, look_up

logger = logging.getLogger(__name__)

NUM_CONNECTIONS = 4

Progress = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The files of one repository that a need takes, at one commit, and the digests of those that are here already."""

    need: Need
    listing: Listing
    names: frozenset[str]
    digests: dict[str, Digest]

    @property
    def missing(self) -> list[str]:
        return sorted(self.names - self.digests.keys())

    @property
    def num_missing_bytes(self) -> int:
        return sum(self.size(name) for name in self.missing)

    def size(self, name: str) -> int:
        return self.listing.files[name].size

    def __or__(self, other: Wanted) -> Wanted:
        """Both, of the same commit of the same repository. The Hub's list of its files has more than the lock's."""
        listing = max(self.listing, other.listing, key=lambda listing: len(listing.files))
        return Wanted(self.need, listing, self.names | other.names, self.digests | other.digests)


@dataclass(slots=True)
class Planner:
    """Finds out what is wanted, asking the Hub once per repository; small index files are fetched on the way.

    With `update` the lock's commits don't count, and each revision is resolved anew.
    """

    lock: Lock
    update: bool = False
    _listings: dict[str, Listing] = field(default_factory=dict)

    def plan(self, need: Need) -> Wanted:
        """Raises SourceError."""
        return self._from_lock(need) or self._from_hub(need)

    def plan_all(self, needs: Iterable[Need]) -> dict[str, Wanted]:
        """One for each repository and revision, by its key in the lock file."""
        plan: dict[str, Wanted] = {}
        for need in needs:
            key, wanted = lock_key(need.source, need.revision), self.plan(need)
            plan[key] = plan[key] | wanted if key in plan else wanted
        return plan

    def _from_lock(self, need: Need) -> Wanted | None:
        """Without asking anybody, where the lock knows all files and the cache has them."""
        locked = self._locked(need)
        if locked is None:
            return None
        files = {name: RemoteFile(file.size, "", file.sha256) for name, file in locked.files.items()}
        listing = Listing(need.source, locked.commit, files)
        selection = select(need, files, listing.snapshot.read)
        wanted = Wanted(need, listing, selection.names, _sound_digests(listing, selection.names))
        return None if selection.lacking or wanted.missing else wanted

    def _from_hub(self, need: Need) -> Wanted:
        listing = self._look_up(need)
        selection = select(need, listing.files, lambda name: _read(listing, name))
        if selection.lacking:
            raise SourceError(f"{need.source} lacks {'; '.join(selection.lacking)}")
        return Wanted(need, listing, selection.names, _sound_digests(listing, selection.names))

    def _look_up(self, need: Need) -> Listing:
        key = lock_key(need.source, need.revision)
        if key not in self._listings:
            locked = self._locked(need)
            listing = look_up(need.source, locked.commit if locked else need.revision)
            self._listings[key] = _bound(listing, locked.files) if locked else listing
        return self._listings[key]

    def _locked(self, need: Need) -> LockedRepository | None:
        return None if self.update else self.lock.repositories.get(lock_key(need.source, need.revision))


def _bound(listing: Listing, locked: dict[str, LockedFile]) -> Listing:
    """By the lock's SHA-256 too, of which the Hub has none for small files."""
    files = dict(listing.files)
    for name in files.keys() & locked.keys():
        if files[name].sha256 not in (None, locked[name].sha256):
            raise SourceError(f"{listing.repository}: the Hub and the lock file have another SHA-256 each of {name}")
        files[name] = replace(files[name], sha256=locked[name].sha256)
    return replace(listing, files=files)


def _sound_digests(listing: Listing, names: Iterable[str]) -> dict[str, Digest]:
    """Of the files that are here; one that is damaged is thrown away."""
    digests = {}
    for name in names:
        if listing.snapshot.has(name):
            digest = digest_of(listing.snapshot.path(name))
            if difference := listing.files[name].explain_difference(digest):
                logger.warning("%s: %s was damaged on this machine: %s", listing.repository, name, difference)
                listing.snapshot.discard(name)
            else:
                digests[name] = digest
    return digests


def _read(listing: Listing, name: str) -> bytes | None:
    if not _sound_digests(listing, [name]):
        download(listing, name)
    return listing.snapshot.read(name)


def fetch(wanted: Wanted, lock: Lock, progress: Progress = lambda _name, _num_bytes: None) -> Lock:
    """Downloads what is missing, several files at a time. Returns the lock with all that is wanted.

    The first error ends the others. Raises SourceError.
    """
    digests = {**wanted.digests, **dict(_download_all(wanted, progress))}
    listing = wanted.listing
    if listing.revision:  # the lock file's commit is not where the branch is
        listing.snapshot.note_revision(listing.revision)
    files = {name: LockedFile(sha256=digest.sha256, size=digest.size) for name, digest in digests.items()}
    return lock.with_files(lock_key(listing.repository, wanted.need.revision), listing.commit, files)


def _download_all(wanted: Wanted, progress: Progress) -> Iterator[tuple[str, Digest]]:
    stop = threading.Event()

    def get(name: str) -> tuple[str, Digest]:
        return name, download(wanted.listing, name, lambda num_bytes: progress(name, num_bytes), stop)

    with ThreadPoolExecutor(NUM_CONNECTIONS, "pull") as pool:
        try:
            for future in as_completed([pool.submit(get, name) for name in wanted.missing]):
                yield future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
