"""How long `fewstep serve` takes from its start to its first picture.

    python -m benchmarks.start            # about a minute

Ready means that `/readyz` answers 200: every size and batch size of the model has drawn real pictures by then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shared.machine import REPOSITORY
from benchmarks.shared.report import print_table, write_report
from benchmarks.shared.servers import Contender, Drawing, fewstep_server


@dataclass(frozen=True)
class Start:
    """Seconds from the start of the command until it was ready, what the first picture took then, and how far warm-up
    lets a batch grow."""

    ready_s: float
    first_picture_ms: float
    max_rows: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-lcm")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-start.json")
    options = parser.parse_args()
    starts = [measure(Drawing(options.model, options.steps)) for _ in range(options.times)]
    print_table(starts)
    print(f"median: ready after {statistics.median(start.ready_s for start in starts):.1f} s")
    write_report(options.json, vars(options), {"starts": starts})


def measure(drawing: Drawing) -> Start:
    started_s = time.perf_counter()
    with fewstep_server(drawing) as service:
        ready_s = time.perf_counter() - started_s
        return Start(ready_s, draw(service), service.max_rows)


def draw(service: Contender) -> float:
    body = json.dumps({"prompt": "a red apple", **service.fields}).encode()
    headers = {"Content-Type": "application/json", "Accept": "image/png"}
    url = f"http://127.0.0.1:{service.server.port}/v1/generations"
    started_s = time.perf_counter()
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as answer:
        assert answer.read().startswith(b"\x89PNG")
    return (time.perf_counter() - started_s) * 1000


if __name__ == "__main__":
    main()
