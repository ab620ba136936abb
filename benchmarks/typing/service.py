"""The running `fewstep serve`, and what its metrics count."""

from __future__ import annotations

import contextlib
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.shared.figures import BenchmarkError
from benchmarks.shared.servers import Server, free_port, running

NOTHING_LEFT_WITHIN_S = 5.0


@dataclass(frozen=True)
class Work:
    """Rows that the worker computed, and those among them for requests that were then stopped."""

    rows: float
    stopped_rows: float

    def __sub__(self, earlier: Work) -> Work:
        return Work(self.rows - earlier.rows, self.stopped_rows - earlier.stopped_rows)


@dataclass(frozen=True)
class Service:
    port: int
    worker_metrics_port: int
    model: str

    @classmethod
    @contextlib.contextmanager
    def running(cls, model: str) -> Iterator[Service]:
        server, metrics_port = Server("fewstep serve", free_port()), free_port()
        command = ["env", f"FEWSTEP_WORKER_METRICS_PORT={metrics_port}", sys.executable, "-m", "cli", "serve"]
        with running([*command, "--port", str(server.port), "--model", model], server):
            yield cls(server.port, metrics_port, model)

    def read_work(self) -> Work:
        return Work(*scrape(self.worker_metrics_port, self.model, "fewstep_rows_total", "fewstep_stopped_rows_total"))

    def check_that_nothing_is_left(self) -> None:
        """All sockets are closed, so their requests must be gone soon. Raises BenchmarkError."""
        names = ("fewstep_queue_depth", "fewstep_running_requests", "fewstep_live_connections")
        end_s = time.monotonic() + NOTHING_LEFT_WITHIN_S
        while any(left := scrape(self.port, self.model, *names)):
            if time.monotonic() > end_s:
                what = dict(zip(names, left, strict=True))
                raise BenchmarkError(f"{NOTHING_LEFT_WITHIN_S:g} s after the last typist left there is still {what}")
            time.sleep(0.1)


def scrape(port: int, model: str, *names: str) -> list[float]:
    """The metrics' values for `model` and where there is no model; 0 for one that has not counted yet."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
    except OSError as error:
        raise BenchmarkError(f"no metrics on port {port}: {error}") from error
    known = {family.name: family.samples for family in families}
    if missing := [name for name in names if name.removesuffix("_total") not in known]:
        raise BenchmarkError(f"the metrics on port {port} lack {', '.join(missing)}")
    return [
        sum(
            sample.value
            for sample in known[name.removesuffix("_total")]
            if sample.name == name and sample.labels.get("model", model) == model
        )
        for name in names
    ]
