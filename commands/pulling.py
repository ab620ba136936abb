"""fewstep models pull: licences, disk space, progress, lock file."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import huggingface_hub
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

from commands.console import configure_logging, console, fail, format_bytes, say
from models.catalog import ModelSpec
from models.hub.cache import free_bytes
from models.hub.lockfile import Lock, add_to_lock, check_writable, lock_key, read_lock
from models.hub.needs import Need, needs_of
from models.hub.pull import Planner, Progress, Wanted, fetch
from models.sources import local_path, locate

logger = logging.getLogger("fewstep")

NON_COMMERCIAL = re.compile(r"\bnon-?\s?commercial", re.IGNORECASE)


def pull_models(specs: list[ModelSpec], catalog: list[ModelSpec], lock_file: Path, *, update: bool) -> None:
    """Raises SourceError."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not console.is_terminal:
        configure_logging()
    lock = read_lock(lock_file)
    check_writable(lock_file)
    with console.status("asking the Hub what there is"):
        plan = Planner(lock, update).plan_all(need for spec in specs for need in _hub_needs(spec))
    for spec in specs:
        _notice(spec)
    _check_space(plan)
    new = _fetch_all(plan, lock, lock_file)
    for spec in specs:
        _report(spec, new, lock_file)
    _tell_others(specs, catalog, lock, new)


def _hub_needs(spec: ModelSpec) -> list[Need]:
    """What is local can't be pulled, so it has to be there."""
    needs = needs_of(spec)
    for need in needs:
        if local_path(need.source) is not None:
            locate(spec, need.part)
    return [need for need in needs if local_path(need.source) is None]


def _notice(spec: ModelSpec) -> None:
    """Licences; in yellow, and in so many words, where they forbid commercial use."""
    _say_licence(spec.name, spec.license, spec.license_note)
    for lora in spec.loras.values():
        _say_licence(f"{spec.name}, LoRA {lora.name}", lora.license, lora.license_note)
    if spec.license_url:
        say(f"{spec.name}: {spec.license_url}")


def _say_licence(what: str, license: str, note: str) -> None:
    words = " · ".join(part for part in (license, note) if part)
    if NON_COMMERCIAL.search(words):
        say(f"{what}: NOT FOR COMMERCIAL USE: licence {words}", "bold yellow")
    else:
        say(f"{what}: licence {words}")


def _check_space(plan: Mapping[str, Wanted]) -> None:
    num_missing, num_free = sum(wanted.num_missing_bytes for wanted in plan.values()), free_bytes()
    if num_missing > num_free:
        where = huggingface_hub.constants.HF_HUB_CACHE
        fail(f"{format_bytes(num_missing)} are to come, and the disk of {where} has {format_bytes(num_free)}", status=1)


def _fetch_all(plan: Mapping[str, Wanted], lock: Lock, lock_file: Path) -> Lock:
    """The lock file is written after each repository: what is here is known even if the next one fails."""
    sizes = {f"{key}/{name}": wanted.size(name) for key, wanted in plan.items() for name in wanted.missing}
    with _show_progress(sizes) as progress:
        for key, wanted in plan.items():
            lock = fetch(wanted, lock, partial(_of_repository, progress, key))
            add_to_lock(lock_file, key, lock.repositories[key])
    return lock


def _of_repository(progress: Progress, key: str, name: str, num_bytes: int) -> None:
    progress(f"{key}/{name}", num_bytes)


@contextmanager
def _show_progress(sizes: Mapping[str, int]) -> Iterator[Progress]:
    """A bar for each file and one for all; log lines where there is no terminal."""
    if not console.is_terminal:
        yield _log_lines(sizes)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bars(*columns, TimeRemainingColumn(), console=console) as bars:
        tasks = {name: bars.add_task(name, total=size) for name, size in sizes.items()}
        total = bars.add_task("total", total=sum(sizes.values()))

        def advance(name: str, num_bytes: int) -> None:
            bars.advance(tasks[name], num_bytes)
            bars.advance(total, num_bytes)

        yield advance


def _log_lines(sizes: Mapping[str, int]) -> Progress:
    """One per file, once all of it is here."""
    num_here: Counter[str] = Counter()

    def advance(name: str, num_bytes: int) -> None:
        num_here[name] += num_bytes
        if num_here[name] == sizes[name]:
            num_done = sum(num_here[name] == size for name, size in sizes.items())
            logger.info("%d of %d: %s, %s", num_done, len(sizes), name, format_bytes(sizes[name]))

    return advance


def _report(spec: ModelSpec, lock: Lock, lock_file: Path) -> None:
    needs = _hub_needs(spec)
    if not needs:
        say(f"{spec.name}: nothing to pull, all of it is on this machine")
        return
    for key in sorted({lock_key(need.source, need.revision) for need in needs}):
        locked = lock.repositories[key]
        num_bytes = sum(file.size for file in locked.files.values())
        say(f"{spec.name}: {key} is here at {locked.commit}, {format_bytes(num_bytes)}")
    say(f"{spec.name}: ready; {lock_file} has its commits and checksums", "green")


def _tell_others(specs: list[ModelSpec], catalog: list[ModelSpec], old: Lock, new: Lock) -> None:
    """Of repositories that moved on, and of entries that so far used the old commit with them."""
    moved = {key for key, locked in old.repositories.items() if new.repositories[key].commit != locked.commit}
    for key in sorted(moved):
        say(f"{key}: from {old.repositories[key].commit} to {new.repositories[key].commit}")
    for spec in catalog:
        if spec not in specs and moved.intersection(lock_key(need.source, need.revision) for need in needs_of(spec)):
            say(f"{spec.name} uses it too: fewstep models pull {spec.name}", "yellow")
