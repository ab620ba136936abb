"""Leases: a worker keeps what it runs by saying so again and again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from broker.connections import connect_from_thread
from broker.errors import BrokerError
from broker.messages import Abort
from broker.scripts import renew

log = logging.getLogger(__name__)


class LeaseRenewer:
    """Renews a worker's leases on its own thread and connection, as long as the engine makes progress.

    `get_running` is called on that thread every third of a lease and names the requests whose last progress is recent:
    what it leaves out loses its lease, so that work on a hung GPU goes to another worker. `on_abort`, also called
    there, hears what Redis says beyond "renewed": that a request is to be stopped (should the message on the control
    stream have been missed) or belongs to someone else by now.
    """

    def __init__(
        self,
        url: str,
        prefix: str,
        worker_id: str,
        lease_s: float,
        get_running: Callable[[], Sequence[str]],
        on_abort: Callable[[Abort], None] | None = None,
    ) -> None:
        self._client = connect_from_thread(url, timeout_s=max(0.2, lease_s / 4))
        self._prefix, self._worker_id, self._lease_s = prefix, worker_id, lease_s
        self._get_running, self._on_abort = get_running, on_abort
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main_loop, name="lease-renewer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self._client.close()

    def _main_loop(self) -> None:
        pause_s = self._lease_s / 3
        while not self._stopping.wait(pause_s):
            try:
                self.renew_once()
                pause_s = self._lease_s / 3
            except BrokerError as error:
                log.warning("leases of %s not renewed: %s", self._worker_id, error)
                pause_s = self._lease_s / 10
            except Exception:
                log.exception("leases of %s not renewed", self._worker_id)
                pause_s = self._lease_s / 10

    def renew_once(self) -> None:
        running = tuple(self._get_running())
        if not running:
            return
        for request_id, verdict in renew(self._client, self._prefix, self._worker_id, running).items():
            if verdict != "renewed" and self._on_abort is not None:
                self._on_abort(Abort(request_id, "cancelled" if verdict == "cancelled" else "lost"))
