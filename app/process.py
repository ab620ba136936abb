"""What the gateway asks of its own process: room for many sockets, and no long pauses."""

from __future__ import annotations

import contextlib
import gc
import logging
import resource

# A full collection walks over every object there is: 0.3 s with 2,000 live sockets, in which no picture goes out.
# Almost everything here is freed by its last reference, so full ones may be rare; what requests leave behind in cycles
# is found among the young objects.
GC_THRESHOLDS = (10_000, 20, 50)
MAX_OPEN_FILES = 65_536
FILES_BESIDE_CONNECTIONS = 128  # connections to Redis, logs, modules

log = logging.getLogger(__name__)


def prepare_process(max_connections: int) -> None:
    """To be called once, when everything is imported and nothing is served yet."""
    allow_open_files(max_connections + FILES_BESIDE_CONNECTIONS)
    calm_garbage_collector()


def allow_open_files(wanted: int) -> None:
    """Raises the soft limit of open files towards the hard one, and warns where `wanted` is still out of reach.

    The usual soft limit of 1,024 is there for programs that use `select`, which this one doesn't.
    """
    soft, hard = (MAX_OPEN_FILES if limit == resource.RLIM_INFINITY else limit for limit in _limits())
    with contextlib.suppress(ValueError, OSError):  # macOS names no hard limit and has one
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, MAX_OPEN_FILES)), _limits()[1]))
    if (allowed := _limits()[0]) < wanted:
        message = "%d files may be open, FEWSTEP_MAX_CONNECTIONS needs %d: raise the hard limit (ulimit -Hn)"
        log.warning(message, allowed, wanted)


def _limits() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def calm_garbage_collector() -> None:
    """Modules and routes stay for ever: they are left out of all collections from now on."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
