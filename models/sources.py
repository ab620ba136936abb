"""Where the files of a model are: from a catalog entry's sources to places on this machine. Never needs torch.

Whatever loads a model asks here first; after that everything is read from local paths.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from models.catalog import BUNDLED_PATH, ModelSpec
from models.hub.errors import SourceError
from models.hub.lockfile import LOCK_FILE, Lock, lock_key, read_lock
from models.hub.needs import Need, Selection, need_of, select

__all__ = ["Place", "SourceError", "local_path", "locate"]

logger = logging.getLogger(__name__)

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class Place:
    """A folder or a file that exists, and the revision of what is in it where one is known."""

    path: Path
    revision: str | None


def locate(spec: ModelSpec, part: str, *, lock_file: Path = LOCK_FILE, only_look: bool = False) -> Place:
    """Where a part of the entry is: source, config, unet, vae, tiny_vae, safety_checker, lora or "loras.<name>".

    Of a single network it is the folder of its config.json, of a LoRA the file of its weights. From the Hub it is at
    the commit of the lock file, else at the entry's revision, else at main as last fetched. What isn't here is
    downloaded, unless `only_look` or HF_HUB_OFFLINE forbids it. Raises SourceError.
    """
    need = need_of(spec, part)
    path = local_path(need.source)
    if path is not None:
        return Place(_local_part(need, path), need.revision)
    lock = read_lock(lock_file)
    place, lacking = _find(need, lock)
    if place is not None:
        return place
    _check_may_fetch(need, lacking, only_look)
    return _fetch(need, lock)


def local_path(source: str) -> Path | None:
    """The folder or file that a source names, whether or not it is there; None for a repository on the Hub."""
    kind, _, folder = source.partition(":")
    if kind == "bundled":
        return BUNDLED_PATH / folder
    path = Path(source).expanduser()
    is_repository = REPOSITORY.fullmatch(source) and path.suffix != ".safetensors" and not path.exists()
    return None if is_repository else path


def _local_part(need: Need, path: Path) -> Path:
    if not path.exists():
        kind = "file" if path.suffix == ".safetensors" else "folder"
        raise SourceError(f"{need.model}: {need.part}: there is no {kind} {path}")
    match need.kind:
        case "file" if path.is_dir():
            return _local_weights(need, path)
        case "network" if not (path / "config.json").exists():
            folder = "vae" if need.part == "tiny_vae" else need.part
            return path / folder if (path / folder / "config.json").exists() else path
        case _:
            return path


def _local_weights(need: Need, folder: Path) -> Path:
    path = folder / need.weight_name
    if not path.is_file():
        others = ", ".join(sorted(other.name for other in folder.glob("*.safetensors"))) or "no safetensors file"
        raise SourceError(f"{need.model}: {need.part}: {folder} has no {need.weight_name}; it has {others}")
    return path


def _find(need: Need, lock: Lock) -> tuple[Place | None, tuple[str, ...]]:
    """In the Hub's cache; else what it lacks."""
    from models.hub.cache import Snapshot, cached_commit

    locked = lock.repositories.get(lock_key(need.source, need.revision))
    commit = locked.commit if locked else cached_commit(need.source, need.revision)
    if commit is None:
        return None, ()
    snapshot = Snapshot(need.source, commit)
    sizes = {name: file.size for name, file in locked.files.items()} if locked else {}
    selection = select(need, sizes, snapshot.read)
    if selection.lacking:  # the lock knows nothing of this part
        selection = select(need, snapshot.names(), snapshot.read)
    sound = {name for name in selection.names if snapshot.has_size(name, sizes.get(name))}
    lacking = (*selection.lacking, *sorted(selection.names - sound))
    return (None if lacking else Place(_part_of(need, snapshot.folder, selection), commit)), lacking


def _part_of(need: Need, folder: Path, selection: Selection) -> Path:
    return folder / need.weight_name if need.kind == "file" else folder / selection.folder


def _check_may_fetch(need: Need, lacking: tuple[str, ...], only_look: bool) -> None:
    from huggingface_hub import is_offline_mode

    if only_look or is_offline_mode():
        what = f"of {need.source} {lacking[0]} is" if lacking else f"{need.source} is"
        reason = "" if only_look else ", and HF_HUB_OFFLINE is set"
        raise SourceError(f"{need.model}: {what} not on this machine{reason}: fewstep models pull {need.model}")


def _fetch(need: Need, lock: Lock) -> Place:
    from models.hub.pull import Planner, fetch

    try:
        wanted = Planner(lock).plan(need)
        logger.info("%s: downloading %.1f MB from %s", need.model, wanted.num_missing_bytes / 1e6, need.source)
        place, lacking = _find(need, fetch(wanted, lock))
    except SourceError as error:
        raise SourceError(f"{need.model}: {error}") from error
    assert place is not None, lacking
    return place
