"""What the gateway itself costs: all that lies between a client's socket and the engine, which takes no time here.

    python -m benchmarks.gateway             # about five minutes
    python -m benchmarks.gateway --quick     # half a minute, to see that it works; the figures mean little

A real gateway and a real Redis, each a process of its own; the worker is another, speaks the real protocol and answers
at once with a JPEG of 512x512 (`instant_worker.py`); the clients are a fourth. Per round and form of answer: a closed
loop that keeps the gateway busy, one connection alone, and many connections with requests at random times, at a part of
what the closed loop gave. Before that: memory over many requests, and live sockets, many that are idle and some at
which people type.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import redis

from benchmarks.gateway.clients import FORMS, Form, HttpReport, HttpTurn, LiveReport, LiveTurn, run_http, run_live
from benchmarks.gateway.instant_worker import MODEL
from benchmarks.shared.figures import BenchmarkError
from benchmarks.shared.machine import REPOSITORY
from benchmarks.shared.report import print_table, write_report
from benchmarks.shared.rounds import percentiles, take_medians
from benchmarks.shared.servers import Server, free_port, running
from broker.embedded import EmbeddedRedis
from broker.scripts import load_script

PREFIX = "benchmark"
BUSY_CONNECTIONS = 32
SCRIPTS = ("submit", "take", "finish")
KEEP_S = 5  # how long results stay in Redis: at these rates the usual minute would fill its budget
MIB = 2**20

ALONE_P50_MS, ALONE_P99_MS, MANY_P99_MS = 3.0, 8.0, 15.0  # the aims
MAX_SOCKET_KIB = 60.0
MAX_GROWTH = 0.05


@dataclass(frozen=True)
class Plan:
    """How much is measured. `soaks` are the turns over which memory is watched, `many` the connections of the open
    loops, `percents` their rates by capacity."""

    rounds: int = 3
    seconds: float = 4.0
    soaks: int = 6
    many: int = 500
    percents: tuple[int, ...] = (25, 50)
    idle: tuple[int, ...] = (0, 500, 1000, 2000)
    active: int = 200
    prompts_per_s: float = 2.0
    live_seconds: float = 15.0


QUICK = Plan(rounds=1, seconds=0.5, soaks=2, many=20, percents=(25,), idle=(0, 10, 20), active=4, live_seconds=2.0)


@dataclass(frozen=True)
class Cost:
    """A busy gateway: what a request takes of each process, in ms of CPU time. `others_cores` is what programs that
    have nothing to do with this one took meanwhile; so it is in the other tables."""

    form: Form
    requests_per_s: float
    gateway_ms: float
    requests_per_core_s: float
    redis_ms: float
    worker_ms: float
    clients_ms: float
    others_cores: float


@dataclass(frozen=True)
class Latency:
    """Socket to socket, less what the engine took. `rate_per_s` None is a closed loop. CPU time is per request."""

    form: Form
    connections: int
    percent: int | None
    rate_per_s: float | None
    p50_ms: float
    p99_ms: float
    gateway_ms: float
    redis_ms: float
    worker_ms: float
    clients_ms: float
    others_cores: float


@dataclass(frozen=True)
class ScriptCost:
    """Time inside Redis of one script, by its own slow log, with one connection at work."""

    script: str
    calls_per_request: float
    p50_us: float


@dataclass(frozen=True)
class Growth:
    """Resident memory of the gateway after so many requests."""

    requests: int
    resident_mib: float


@dataclass(frozen=True)
class Idle:
    sockets: int
    resident_mib: float
    kib_per_socket: float | None


@dataclass(frozen=True)
class Live:
    """`cores` are what each process took. Latency goes from a prompt to its final picture."""

    idle: int
    active: int
    prompts: int
    finals: int
    superseded: int
    errors: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    gateway_cores: float
    redis_cores: float
    worker_cores: float
    clients_cores: float
    others_cores: float


@dataclass(frozen=True)
class Bench:
    """The running processes, and the pool of one in which the clients run."""

    port: int
    pids: Mapping[str, int]
    redis_url: str
    clients: Executor

    def run_http(
        self, form: Form, connections: int, seconds: float, seed: int, rate: float | None = None
    ) -> HttpReport:
        turn = HttpTurn(self.port, form, connections, seconds, seed, self.pids, rate)
        try:
            report = self.clients.submit(run_http, turn).result()
        except* ValueError as group:
            raise BenchmarkError(f"{form} over {connections} connections: {group.exceptions[0]}") from None
        if len(report.added_ms) < 2:
            raise BenchmarkError(
                f"{form} over {connections} connections gave too few answers: more --seconds are needed"
            )
        return report

    def resident_mib(self) -> float:
        return float(psutil.Process(self.pids["gateway"]).memory_info().rss / MIB)


def main() -> None:
    options = parse_options()
    allow_open_files()
    plan = QUICK if options.quick else Plan(rounds=options.rounds, seconds=options.seconds)
    try:
        with start(max(plan.idle) + plan.active) as bench:
            measure(bench, plan, options)
    except BenchmarkError as error:
        sys.exit(f"benchmark failed: {error}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gateway", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one short round, few connections")
    parser.add_argument("--rounds", type=int, default=Plan.rounds)
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="of each turn")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-gateway.json")
    return parser.parse_args()


def allow_open_files() -> None:
    """For the clients too, who hold the other end of each socket."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def measure(bench: Bench, plan: Plan, options: argparse.Namespace) -> None:
    growth = measure_growth(bench, plan)
    scripts = measure_scripts(bench, plan)
    idle, live = measure_live(bench, plan)
    costs, latencies = run_rounds(bench, plan)
    medians = {
        "costs": take_medians(costs, "form"),
        "latencies": take_medians(latencies, "form", "connections", "percent"),
    }
    tables = {**medians, "scripts": scripts, "growth": growth, "idle": idle, "live": [live]}
    for table in tables.values():
        print_table(table)
    verdicts = judge(medians["latencies"], growth, idle, live)
    print("\n".join(verdicts))
    rounds = {"rounds_of_costs": costs, "rounds_of_latencies": latencies}
    write_report(options.json, vars(options), {**tables, "verdicts": verdicts, **rounds})


# The processes


@contextlib.contextmanager
def start(num_sockets: int) -> Iterator[Bench]:
    """Redis, worker and gateway; ready."""
    with contextlib.ExitStack() as stack:
        clients = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
        server = stack.enter_context(EmbeddedRedis())
        worker = stack.enter_context(working(server.url))
        port = free_port()
        gateway = stack.enter_context(running(gateway_command(server.url, port, num_sockets), Server("gateway", port)))
        pids = {"gateway": gateway.pid, "redis": server.pid, "worker": worker.pid}
        yield Bench(port, pids, server.url, clients)


@contextlib.contextmanager
def working(redis_url: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "benchmarks.gateway.instant_worker", redis_url, PREFIX]
    process = subprocess.Popen(command, cwd=REPOSITORY)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def gateway_command(redis_url: str, port: int, num_sockets: int) -> list[str]:
    settings = {
        "REDIS_URL": redis_url,
        "REDIS_PREFIX": PREFIX,
        "PORT": port,
        "DEFAULT_MODEL": MODEL,
        "ALLOW_ANONYMOUS": 1,
        "CACHE_S": 0,  # every request is to reach the worker
        "MAX_LIVE_CONNECTIONS": num_sockets,
        "MAX_CONNECTIONS": num_sockets + 1000,
        "KEEP_SYNC_S": KEEP_S,
        "KEEP_ASYNC_S": KEEP_S,
    }
    variables = [f"FEWSTEP_{name}={value}" for name, value in settings.items()]
    return ["env", *variables, sys.executable, "-c", "from cli import main; main()", "gateway"]


# HTTP


def measure_growth(bench: Bench, plan: Plan) -> list[Growth]:
    """Under one and the same load: more connections at once would leave room behind in which growth can hide."""
    growth: list[Growth] = []
    num_requests = 0
    for number in range(plan.soaks):
        num_requests += bench.run_http("json", BUSY_CONNECTIONS, plan.seconds, seed=number).num_answered
        growth.append(Growth(num_requests, bench.resident_mib()))
    return growth


def run_rounds(bench: Bench, plan: Plan) -> tuple[list[Cost], list[Latency]]:
    costs: list[Cost] = []
    latencies: list[Latency] = []
    for number in range(plan.rounds):
        for form in FORMS:
            cost, rows = run_form(bench, plan, form, seed=number + 1)
            costs.append(cost)
            latencies += rows
        print(f"round {number + 1} of {plan.rounds} done", file=sys.stderr)
    return costs, latencies


def run_form(bench: Bench, plan: Plan, form: Form, seed: int) -> tuple[Cost, list[Latency]]:
    cost = to_cost(form, bench.run_http(form, BUSY_CONNECTIONS, plan.seconds, seed))
    rows = [to_latency(form, 1, None, None, bench.run_http(form, 1, plan.seconds, seed))]
    for percent in plan.percents:
        rate_per_s = cost.requests_per_s * percent / 100
        many = bench.run_http(form, plan.many, plan.seconds, seed, rate_per_s)
        rows.append(to_latency(form, plan.many, percent, rate_per_s, many))
    return cost, rows


def to_cost(form: Form, report: HttpReport) -> Cost:
    cpu = cpu_per_request(report)
    per_core_s = 1000 / max(cpu["gateway_ms"], 1e-3)
    return Cost(form, report.num_answered / report.seconds, requests_per_core_s=per_core_s, **cpu)


def to_latency(
    form: Form, connections: int, percent: int | None, rate_per_s: float | None, report: HttpReport
) -> Latency:
    p50_ms, _, p99_ms = percentiles(report.added_ms)
    return Latency(form, connections, percent, rate_per_s, p50_ms, p99_ms, **cpu_per_request(report))


def cpu_per_request(report: HttpReport) -> dict[str, float]:
    ours = {role: seconds for role, seconds in report.cpu_s.items() if role != "others"}
    per_request_ms = {f"{role}_ms": seconds * 1000 / max(1, report.num_answered) for role, seconds in ours.items()}
    return per_request_ms | {"others_cores": report.cpu_s["others"] / report.seconds}


# Scripts


def measure_scripts(bench: Bench, plan: Plan) -> list[ScriptCost]:
    """By Redis' slow log, which for this time takes everything; so it is no turn that counts elsewhere."""
    names = {load_script(name).sha.encode(): name for name in SCRIPTS}
    durations_us: dict[str, list[int]] = {name: [] for name in SCRIPTS}
    with contextlib.closing(redis.Redis.from_url(bench.redis_url)) as client:
        client.config_set("slowlog-max-len", 1_000_000)
        client.config_set("slowlog-log-slower-than", 0)
        bench.run_http("bytes", 1, min(1.0, plan.seconds), seed=0)
        client.config_set("slowlog-log-slower-than", -1)
        for entry in client.slowlog_get(1_000_000):
            command = entry["command"].split(b" ", 2)
            if len(command) > 1 and (name := names.get(command[1])):
                durations_us[name].append(entry["duration"])
    num_requests = len(durations_us["finish"])
    return [ScriptCost(name, len(us) / num_requests, statistics.median(us)) for name, us in durations_us.items()]


# Live sockets


def measure_live(bench: Bench, plan: Plan) -> tuple[list[Idle], Live]:
    turn = LiveTurn(bench.port, plan.idle, plan.active, plan.prompts_per_s, plan.live_seconds, bench.pids)
    report = bench.clients.submit(run_live, turn).result()
    if len(report.latencies_ms) < 2:
        raise BenchmarkError(f"live sockets gave {len(report.latencies_ms)} pictures, errors {report.errors}")
    return to_idle(report), to_live(report, turn)


def to_idle(report: LiveReport) -> list[Idle]:
    """The cost of a socket counts from the first number above none: the first few make room for more."""
    resident = report.resident_bytes
    first = min(number for number in resident if number)

    def kib_per_socket(number: int) -> float | None:
        return (resident[number] - resident[first]) / (number - first) / 1024 if number > first else None

    return [Idle(number, resident[number] / MIB, kib_per_socket(number)) for number in resident]


def to_live(report: LiveReport, turn: LiveTurn) -> Live:
    p50_ms, p95_ms, p99_ms = percentiles(report.latencies_ms)
    return Live(
        idle=max(turn.idle),
        active=turn.active,
        prompts=report.num_prompts,
        finals=len(report.latencies_ms),
        superseded=report.num_superseded,
        errors=sum(report.errors.values()) + report.num_idle_lost,
        p50_ms=p50_ms,
        p95_ms=p95_ms,
        p99_ms=p99_ms,
        **{f"{role}_cores": seconds / report.seconds for role, seconds in report.cpu_s.items()},
    )


# The verdict


def judge(latencies: Sequence[Latency], growth: Sequence[Growth], idle: Sequence[Idle], live: Live) -> list[str]:
    verdicts = [verdict for row in latencies for verdict in judge_latency(row)]
    kib = idle[-1].kib_per_socket
    if kib is not None:
        verdicts.append(
            f"{met(kib <= MAX_SOCKET_KIB)}: {kib:.0f} KiB per idle socket (aim: at most {MAX_SOCKET_KIB:g})"
        )
    is_held = live.errors == 0 and live.finals + live.superseded == live.prompts
    verdicts.append(
        f"{met(is_held)}: {live.idle} idle and {live.active} active sockets, {live.finals} finals of {live.prompts} "
        f"prompts, {live.superseded} superseded, {live.errors} errors (aim: all answered)"
    )
    first, last = growth[0], growth[-1]
    grown = last.resident_mib / first.resident_mib - 1
    verdicts.append(
        f"{met(grown <= MAX_GROWTH)}: resident memory grown by {grown:.1%} from {first.requests} requests to "
        f"{last.requests} (aim: at most {MAX_GROWTH:.0%})"
    )
    return verdicts


def judge_latency(row: Latency) -> Iterator[str]:
    if row.percent is None:
        where = f"{row.form}, 1 connection"
        yield f"{met(row.p50_ms <= ALONE_P50_MS)}: {where}: P50 {row.p50_ms:.1f} ms (aim: {ALONE_P50_MS:g})"
        yield f"{met(row.p99_ms <= ALONE_P99_MS)}: {where}: P99 {row.p99_ms:.1f} ms (aim: {ALONE_P99_MS:g})"
    else:
        where = f"{row.connections} connections, {row.percent} % of capacity ({row.rate_per_s:.0f}/s)"
        yield f"{met(row.p99_ms <= MANY_P99_MS)}: {row.form}, {where}: P99 {row.p99_ms:.1f} ms (aim: {MANY_P99_MS:g})"


def met(is_met: bool) -> str:
    return "met" if is_met else "missed"


if __name__ == "__main__":
    main()
