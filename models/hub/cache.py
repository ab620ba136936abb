"""The Hub's cache on this machine, in the layout that huggingface_hub gives it, so that other tools share it.

models--owner--name/blobs/<sha256 or git id>      the bytes
models--owner--name/snapshots/<commit>/<file>     links to them
models--owner--name/refs/<revision>               the commit that a branch or tag was at
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import scan_cache_dir
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import CacheNotFound
from huggingface_hub.file_download import repo_folder_name

from models.hub.errors import SourceError
from models.hub.lockfile import is_safe_name
from models.hub.writing import write_whole

COMMIT = re.compile("[0-9a-f]{40}")
DEFAULT_REVISION = "main"
CHUNK_BYTES = 2**20
PARTIAL_SUFFIX = ".fewstep.incomplete"


@dataclass(frozen=True, slots=True)
class Digest:
    """Of a file's bytes: its size, its SHA-256, and the id that git gives it."""

    size: int
    sha256: str
    git_id: str


def digest_of(path: Path) -> Digest:
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
            git.update(chunk)
    return Digest(size, sha256.hexdigest(), git.hexdigest())


def repository_folder(repository: str) -> Path:
    return Path(HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="model"))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One commit of a repository, as far as its files are here."""

    repository: str
    commit: str

    @property
    def folder(self) -> Path:
        return repository_folder(self.repository) / "snapshots" / self.commit

    def path(self, name: str) -> Path:
        if not is_safe_name(name):
            raise SourceError(f"{self.repository}: the file name {name!r} leads out of the repository")
        return self.folder / name

    def has(self, name: str) -> bool:
        return self.path(name).is_file()

    def has_size(self, name: str, size: int | None) -> bool:
        """Whether it is here, with that many bytes if it is known how many."""
        return self.has(name) and size in (None, self.path(name).stat().st_size)

    def names(self) -> frozenset[str]:
        """Of the files that are here."""
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return frozenset(path.relative_to(self.folder).as_posix() for path in files)

    def read(self, name: str) -> bytes | None:
        return self.path(name).read_bytes() if self.has(name) else None

    def blob(self, blob_id: str) -> Path:
        """Where the bytes of that id belong."""
        return repository_folder(self.repository) / "blobs" / blob_id

    def link(self, name: str, blob: Path) -> None:
        """Makes the file `name` of the bytes in `blob`; where links can't be made, moves them there."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            path.symlink_to(os.path.relpath(blob, path.parent))
        except OSError:
            shutil.move(blob, path)

    def discard(self, name: str) -> None:
        """The file and its bytes."""
        path = self.path(name)
        if path.is_symlink():
            Path(os.path.normpath(path.parent / path.readlink())).unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def note_revision(self, revision: str) -> None:
        """So that others who ask for the branch or tag without the network find this commit."""
        if revision == self.commit:
            return
        folder = repository_folder(self.repository)
        ref = folder / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        write_whole(ref, self.commit, by_way_of=folder)  # everything in refs/ counts as a branch


def cached_commit(repository: str, revision: str | None) -> str | None:
    """The commit that a revision was at when it was last fetched."""
    revision = revision or DEFAULT_REVISION
    if COMMIT.fullmatch(revision):
        return revision
    ref = repository_folder(repository) / "refs" / revision
    return (ref.read_text(encoding="utf-8").strip() or None) if ref.is_file() else None


def snapshots_of(repository: str) -> Iterator[Snapshot]:
    """Every commit that some files are here of."""
    for folder in sorted((repository_folder(repository) / "snapshots").glob("*")):
        yield Snapshot(repository, folder.name)


def free_bytes() -> int:
    """On the disk that the cache is or will be on."""
    folder = Path(HF_HUB_CACHE).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(existing).free


def delete(paths: set[Path]) -> int:
    """Deletes files of snapshots, and repositories that hold none then. Returns the bytes that this frees."""
    try:
        info = scan_cache_dir()
    except CacheNotFound:
        return 0
    freed = 0
    for repository in info.repos:
        every = [file for revision in repository.revisions for file in revision.files]
        chosen = [file for file in every if file.file_path in paths]
        if not chosen:
            continue
        if len(chosen) == len(every):
            plan = info.delete_revisions(*(revision.commit_hash for revision in repository.revisions))
        else:
            plan = info.delete_files(*chosen)
        plan.execute()
        freed += plan.expected_freed_size
    return freed


def delete_partial(repository: str) -> int:
    """Deletes downloads that were never finished. Returns the bytes that this frees."""
    paths = list((repository_folder(repository) / "blobs").glob(f"*{PARTIAL_SUFFIX}"))
    num_freed = sum(path.stat().st_size for path in paths)
    for path in paths:
        path.unlink()
    return num_freed
