"""What is asked of the Hub: a repository's files at a revision, and their bytes. Foreign errors end here.

Files come over plain HTTP with Range, whatever the Hub stores them in: a download that was broken off, even by the end
of the process, goes on from where it was. Nothing gets into the cache before its checksum is proven.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import httpx2
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.constants import ENDPOINT, HF_HUB_DOWNLOAD_TIMEOUT
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import WeakFileLock, build_hf_headers, hf_raise_for_status, http_stream_backoff

from models.hub.cache import COMMIT, DEFAULT_REVISION, PARTIAL_SUFFIX, Digest, Snapshot, digest_of, repository_folder
from models.hub.errors import HubUnavailable, SourceError

logger = logging.getLogger(__name__)

MAX_FAILURES = 4  # in a row, without a byte between them
BUSY = (408, 429, 502, 503, 504)
BLOB_ID = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """What its bytes must be. `blob_id` names them in the cache: the SHA-256 of a large file (LFS), else git's id."""

    size: int
    blob_id: str
    sha256: str | None = None

    def explain_difference(self, digest: Digest) -> str | None:
        """In words, or None where the bytes are the right ones."""
        if digest.size != self.size:
            return f"it has {digest.size} bytes instead of {self.size}"
        if self.sha256 and digest.sha256 != self.sha256:
            return f"its SHA-256 is {digest.sha256} instead of {self.sha256}"
        if self.blob_id not in ("", digest.sha256, digest.git_id):
            return f"its git id is {digest.git_id} instead of {self.blob_id}"
        return None


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository's files at one commit. `revision` is what the Hub was asked for, if it was asked."""

    repository: str
    commit: str
    files: dict[str, RemoteFile]
    revision: str | None = None

    @property
    def snapshot(self) -> Snapshot:
        return Snapshot(self.repository, self.commit)


def look_up(repository: str, revision: str | None) -> Listing:
    """Resolves the revision (main if none) to its commit. Raises SourceError."""
    with _explained(repository, revision):
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=HF_HUB_DOWNLOAD_TIMEOUT)
        files = {file.rfilename: _remote_file(file) for file in info.siblings or ()}
        if info.sha is None or not COMMIT.fullmatch(info.sha):
            raise ValueError(f"{info.sha!r} is no commit")
    return Listing(repository, info.sha, files, revision or DEFAULT_REVISION)


def _remote_file(file: RepoSibling) -> RemoteFile:
    if file.lfs is not None:
        return RemoteFile(file.lfs.size, _checked_id(file, file.lfs.sha256), file.lfs.sha256)
    if file.size is None or file.blob_id is None:
        raise ValueError(f"{file.rfilename} has no size or checksum")
    return RemoteFile(file.size, _checked_id(file, file.blob_id))


def _checked_id(file: RepoSibling, blob_id: str) -> str:
    """The id becomes a path in the cache: nothing but hex digits may name a file there."""
    if not BLOB_ID.fullmatch(blob_id):
        raise ValueError(f"{file.rfilename} has the checksum {blob_id!r}")
    return blob_id


class Cancelled(Exception):
    """Another download failed, or somebody pressed Ctrl-C."""


def download(
    listing: Listing, name: str, advance: Advance = lambda _: None, stop: threading.Event | None = None
) -> Digest:
    """Puts the file into the cache, once its bytes are proven. `advance` hears how many more are here.

    Raises SourceError, and Cancelled once `stop` is set.
    """
    remote, snapshot = listing.files[name], listing.snapshot
    blob = snapshot.blob(remote.blob_id)
    blob.parent.mkdir(parents=True, exist_ok=True)
    with _locked(listing.repository, remote), _explained(listing.repository, listing.commit, name):
        if blob.exists():
            received = blob
            advance(remote.size)
        else:
            received = _receive_all(listing, name, blob, advance, stop or threading.Event())
        digest = digest_of(received)
        if difference := remote.explain_difference(digest):
            received.unlink()
            raise SourceError(f"{listing.repository}: {name} is damaged: {difference}; it was thrown away, pull again")
        received.replace(blob)
        snapshot.link(name, blob)
    return digest


def _receive_all(listing: Listing, name: str, blob: Path, advance: Advance, stop: threading.Event) -> Path:
    """Goes on where an earlier download ended, and after a broken connection as long as something still comes."""
    size, num_failures = listing.files[name].size, 0
    partial = blob.with_name(f"{blob.name}{PARTIAL_SUFFIX}")
    with partial.open("ab") as file:
        advance(file.tell())
        while file.tell() < size:
            num_before = file.tell()
            try:
                _receive(listing, name, file, advance, stop)
                break
            except httpx2.TransportError as error:
                num_failures = 0 if file.tell() > num_before else num_failures + 1
                if num_failures == MAX_FAILURES:
                    raise
                where = f"{listing.repository}: {name}"
                logger.warning("%s broke off at %d of %d bytes: %s", where, file.tell(), size, error)
                stop.wait(0.1 * 3**num_failures)
    return partial


def _receive(listing: Listing, name: str, file: BinaryIO, advance: Advance, stop: threading.Event) -> None:
    url = hf_hub_url(listing.repository, name, revision=listing.commit)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if file.tell():
        headers["Range"] = f"bytes={file.tell()}-"
    with http_stream_backoff(
        "GET",
        url,
        headers=headers,
        timeout=HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(),
        retry_on_status_codes=BUSY,
    ) as response:
        hf_raise_for_status(response)
        if response.status_code != 206 and file.tell():  # a server that knows no Range begins anew
            advance(-file.tell())
            file.truncate(0)
        for chunk in response.iter_bytes():  # as it comes, so that a broken connection loses nothing
            if stop.is_set():
                raise Cancelled
            file.write(chunk)
            advance(len(chunk))
            if file.tell() > listing.files[name].size:
                return


@contextmanager
def _locked(repository: str, remote: RemoteFile) -> Iterator[None]:
    """Two processes that want the same file: one fetches it, the other then finds it."""
    folder = repository_folder(repository)
    path = folder.parent / ".locks" / folder.name / f"{remote.blob_id}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(path):
        yield


@contextmanager
def _explained(repository: str, revision: str | None, name: str | None = None) -> Iterator[None]:
    what = f"{repository}: {name}" if name else repository
    try:
        yield
    except GatedRepoError as error:
        raise SourceError(
            f"{repository} is gated: accept its terms at {ENDPOINT}/{repository}, then set HF_TOKEN to a token of yours"
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{repository}: {ENDPOINT} has no such repository, or a private one, which needs HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{repository} has no revision {revision!r}") from error
    except RemoteEntryNotFoundError as error:
        raise SourceError(f"{what}: there is no such file at {revision}") from error
    except HfHubHTTPError as error:
        is_passing = error.response.status_code in BUSY or error.response.status_code >= 500
        kind = HubUnavailable if is_passing else SourceError
        raise kind(f"{what}: {ENDPOINT} answered {_status(error)}") from error
    except HFValidationError as error:
        raise SourceError(f"{repository!r} is neither a folder nor the name of a repository on the Hub") from error
    except OfflineModeIsEnabled as error:
        raise SourceError(f"{what} can't be fetched while HF_HUB_OFFLINE is set") from error
    except httpx2.HTTPError as error:
        raise HubUnavailable(f"{what}: can't reach {ENDPOINT}: {error or type(error).__name__}") from error
    except OSError as error:
        raise SourceError(f"{what}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{what}: {ENDPOINT} doesn't answer as a Hub does: {error}") from error


def _status(error: HfHubHTTPError) -> str:
    response = error.response
    hint = {401: "; is HF_TOKEN right?", 403: "; may HF_TOKEN read it?"}.get(response.status_code, "; try again later")
    return f"{response.status_code} {response.reason_phrase}{hint}"
