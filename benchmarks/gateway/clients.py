"""The clients of the gateway benchmark: they run in a process of their own, on raw streams.

What they time goes from the first byte of a request to the last byte of its answer, less what the worker says that its
engine took. They also read the CPU time of the processes that they are told of, at both ends of the time that counts.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import random
import re
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import psutil
import uvloop
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from benchmarks.shared.live import SUBPROTOCOL, live_url, parse_header
from benchmarks.shared.load import Connection, draw_arrivals
from benchmarks.shared.prompts import endless_prompts

Form = Literal["bytes", "json", "openai", "async"]
FORMS: tuple[Form, ...] = ("bytes", "json", "openai", "async")

PATIENCE_S = 60.0  # beside the time asked for
MAX_IDLE_S = 4.0  # uvicorn closes connections that are idle for 5 s
ASK_AGAIN_S = 0.02  # how long a client waits after a 202 before it asks for the picture
NUM_DIALLING = 50  # live sockets that are opened at once
SETTLE_S = 1.0
ENGINE_MS = re.compile(rb"denoise;dur=([0-9.]+)")
LOCATION = re.compile(rb"\r\nlocation: *(\S+)\r\n", re.IGNORECASE)

CpuSeconds = dict[str, float]
Report = TypeVar("Report")


@dataclass(frozen=True)
class HttpTurn:
    """Requests of one form over kept-alive connections.

    Without a rate each connection asks again as soon as it is answered; with one, requests fall due at random times
    and each takes the connection that has rested longest. `pids` are the processes whose CPU time is read, by role.
    """

    port: int
    form: Form
    connections: int
    seconds: float
    seed: int
    pids: Mapping[str, int]
    rate_per_s: float | None = None
    warm_up_s: float = 0.5


@dataclass(frozen=True, slots=True)
class Answer:
    """Times are `time.perf_counter`'s."""

    due_s: float
    answered_s: float
    added_ms: float


@dataclass(frozen=True)
class HttpReport:
    """`added_ms` are of the requests that count: without a rate those answered within the time that counts, with one
    those that fell due in it. `num_answered` and CPU time are what lies within it either way. `num_reopened` are
    connections that the server would have closed for being idle."""

    seconds: float
    added_ms: list[float]
    num_answered: int
    cpu_s: CpuSeconds
    num_reopened: int


@dataclass(frozen=True)
class LiveTurn:
    """Sockets that are opened and left alone, and then sockets at which somebody types."""

    port: int
    idle: Sequence[int]
    active: int
    prompts_per_s: float
    seconds: float
    pids: Mapping[str, int]


@dataclass(frozen=True)
class LiveReport:
    """`resident_bytes` of the gateway, by the number of idle sockets. `latencies_ms` go from sending a prompt to its
    final picture."""

    resident_bytes: dict[int, int]
    seconds: float
    num_prompts: int
    latencies_ms: list[float]
    num_superseded: int
    errors: dict[str, int]
    num_idle_lost: int
    cpu_s: CpuSeconds


class Meter:
    """CPU seconds of several processes, of this one, and of all `others` on the machine, from `start` to `stop`."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._processes = {role: psutil.Process(pid) for role, pid in pids.items()} | {"clients": psutil.Process()}
        self._start: CpuSeconds = {}
        self._started_s = 0.0

    def start(self) -> None:
        self._start, self._started_s = self._read(), time.perf_counter()

    def stop(self) -> tuple[float, CpuSeconds]:
        """Seconds since the start, and CPU seconds by role."""
        seconds, end = time.perf_counter() - self._started_s, self._read()
        return seconds, {role: max(0.0, end[role] - self._start[role]) for role in end}  # clocks tick at 10 ms

    def _read(self) -> CpuSeconds:
        times = {role: process.cpu_times() for role, process in self._processes.items()}
        ours = {role: each.user + each.system for role, each in times.items()}
        machine = psutil.cpu_times()
        return ours | {"others": machine.user + machine.nice + machine.system - sum(ours.values())}


# HTTP


def run_http(turn: HttpTurn) -> HttpReport:
    return _run(HttpClients(turn).run(), turn.warm_up_s + turn.seconds + PATIENCE_S)


def _run(work: Coroutine[Any, Any, Report], within_s: float) -> Report:
    gc.disable()  # pauses of the clients are none of the gateway's
    return uvloop.run(asyncio.wait_for(work, within_s))


class HttpClients:
    def __init__(self, turn: HttpTurn) -> None:
        self._turn = turn
        self._requests = endless_requests(turn)
        self._meter = Meter(turn.pids)
        self._open: set[Connection] = set()
        self._rested: asyncio.Queue[Connection] = asyncio.Queue()  # the one that rested longest is the next
        self._answers: list[Answer] = []
        self._is_over, self._num_reopened = False, 0

    async def run(self) -> HttpReport:
        turn = self._turn
        for _ in range(turn.connections):
            self._open.add(await Connection.open(turn.port))
        await self._ask(next(iter(self._open)), next(self._requests), time.perf_counter(), is_checked=True)
        async with asyncio.TaskGroup() as group:
            self._start(group)
            await asyncio.sleep(turn.warm_up_s)
            self._meter.start()
            start_s = time.perf_counter()
            await asyncio.sleep(turn.seconds)
            seconds, cpu_s = self._meter.stop()
            self._is_over = True
        for connection in self._open:
            connection.close()
        return self._report(start_s, seconds, cpu_s)

    def _start(self, group: asyncio.TaskGroup) -> None:
        if self._turn.rate_per_s is None:
            for connection in self._open:
                group.create_task(self._keep_asking(connection))
        else:
            for connection in self._open:
                self._rested.put_nowait(connection)
            group.create_task(self._ask_at_random(group, self._turn.rate_per_s))

    def _report(self, start_s: float, seconds: float, cpu_s: CpuSeconds) -> HttpReport:
        answered = [answer for answer in self._answers if start_s <= answer.answered_s < start_s + seconds]
        due = [answer for answer in self._answers if start_s <= answer.due_s < start_s + seconds]
        counted = answered if self._turn.rate_per_s is None else due
        return HttpReport(seconds, [each.added_ms for each in counted], len(answered), cpu_s, self._num_reopened)

    async def _keep_asking(self, connection: Connection) -> None:
        while not self._is_over:
            await self._ask(connection, next(self._requests), time.perf_counter())

    async def _ask_at_random(self, group: asyncio.TaskGroup, rate_per_s: float) -> None:
        started_s = time.perf_counter()
        for arrival_s in draw_arrivals(rate_per_s, self._turn.seed):
            due_s = started_s + arrival_s
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            if self._is_over:
                return
            group.create_task(self._ask_once(due_s))

    async def _ask_once(self, due_s: float) -> None:
        connection = await self._rested.get()
        if 0 < connection.used_s < time.perf_counter() - MAX_IDLE_S:
            self._open.discard(connection)
            connection.close()
            connection = await Connection.open(self._turn.port)
            self._open.add(connection)
            self._num_reopened += 1
        await self._ask(connection, next(self._requests), due_s)
        self._rested.put_nowait(connection)

    async def _ask(self, connection: Connection, request: bytes, due_s: float, *, is_checked: bool = False) -> None:
        head, data = await connection.exchange(request)
        took_s = connection.used_s - due_s
        if self._turn.form == "async":
            started_s, head, data = await self._fetch(connection, head, data)
            took_s += connection.used_s - started_s
        engine_ms = find_engine_ms(head, data)
        if is_checked:
            check_picture(self._turn.form, data)
        self._answers.append(Answer(due_s, connection.used_s, took_s * 1000 - engine_ms))

    async def _fetch(self, connection: Connection, head: bytes, data: bytes) -> tuple[float, bytes, bytes]:
        """The picture of a request that was answered with 202, and when it was asked for."""
        if (location := LOCATION.search(head)) is None:
            raise ValueError(f"not accepted: {head!r} {data[:200]!r}")
        request = b"GET %b/image HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % location[1]
        while True:
            await asyncio.sleep(ASK_AGAIN_S)
            started_s = time.perf_counter()
            head, data = await connection.exchange(request)
            if b"image_not_ready" not in data:
                return started_s, head, data


def endless_requests(turn: HttpTurn) -> Iterator[bytes]:
    path = "/v1/images/generations" if turn.form == "openai" else "/v1/generations"
    accept = "image/jpeg" if turn.form == "bytes" else "application/json"
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nAccept: {accept}\r\n"
    head += "Prefer: respond-async\r\n" if turn.form == "async" else ""
    for number, prompt in enumerate(endless_prompts(turn.seed)):
        body = json.dumps({"prompt": prompt, "seed": number, "output_format": "jpeg"})
        yield f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def find_engine_ms(head: bytes, data: bytes) -> float:
    """What the worker says that its engine took. Raises ValueError for what is no answer with a picture."""
    engine = ENGINE_MS.search(head)
    if not head.startswith(b"HTTP/1.1 200") or engine is None:
        raise ValueError(f"no picture: {head!r} {data[:200]!r}")
    return float(engine[1])


def check_picture(form: Form, data: bytes) -> None:
    """Raises ValueError unless the answer holds a JPEG."""
    if form in ("json", "openai"):
        answer = json.loads(data)
        [image] = answer["images" if form == "json" else "data"]
        data = base64.b64decode(image["b64_json"])
    if not data.startswith(b"\xff\xd8"):
        raise ValueError(f"the {form} answer holds no JPEG: {data[:20]!r}")


# Live sockets


def run_live(turn: LiveTurn) -> LiveReport:
    return _run(hold_sockets(turn), turn.seconds + max(turn.idle) / 20 + PATIENCE_S)


async def hold_sockets(turn: LiveTurn) -> LiveReport:
    gateway = psutil.Process(turn.pids["gateway"])
    resident_bytes: dict[int, int] = {}
    async with contextlib.AsyncExitStack() as stack:
        idle: list[ClientConnection] = []
        for number in turn.idle:
            idle += await open_sockets(stack, turn.port, number - len(idle))
            await asyncio.sleep(SETTLE_S)
            resident_bytes[number] = gateway.memory_info().rss
        prompts = endless_prompts(0)
        people = [Person(socket, prompts) for socket in await open_sockets(stack, turn.port, turn.active)]
        next(prompts)  # shuffles them all, which would hold up the first one who types
        seconds, cpu_s = await use_sockets(people, turn)
        num_lost = sum(socket.close_code is not None for socket in idle)
        return LiveReport(
            resident_bytes=resident_bytes,
            seconds=seconds,
            num_prompts=sum(person.num_prompts for person in people),
            latencies_ms=[ms for person in people for ms in person.latencies_ms],
            num_superseded=sum(person.num_superseded for person in people),
            errors=dict(sum((person.errors for person in people), Counter())),
            num_idle_lost=num_lost,
            cpu_s=cpu_s,
        )


async def open_sockets(stack: contextlib.AsyncExitStack, port: int, number: int) -> list[ClientConnection]:
    """Each has heard `ready`."""
    dialling = asyncio.Semaphore(NUM_DIALLING)

    async def dial() -> ClientConnection:
        async with dialling:
            opening = connect(
                live_url(port),
                subprotocols=[SUBPROTOCOL],
                compression=None,
                max_size=None,
                ping_interval=None,
                proxy=None,
            )
            socket = await stack.enter_async_context(opening)
            await socket.recv()
            return socket

    return await asyncio.gather(*(dial() for _ in range(number)))


async def use_sockets(people: Sequence[Person], turn: LiveTurn) -> tuple[float, CpuSeconds]:
    meter = Meter(turn.pids)
    async with asyncio.TaskGroup() as group:
        listening = [group.create_task(person.listen()) for person in people]
        typing = [group.create_task(person.type(turn.prompts_per_s, turn.seconds)) for person in people]
        meter.start()
        await asyncio.wait(typing)
        seconds, cpu_s = meter.stop()
        await asyncio.sleep(SETTLE_S)
        for task in listening:
            task.cancel()
    return seconds, cpu_s


@dataclass
class Person:
    """Sends prompts, acknowledges pictures, and remembers when they came."""

    socket: ClientConnection
    prompts: Iterator[str]
    num_prompts: int = 0
    num_superseded: int = 0
    latencies_ms: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    _sent_s: dict[int, float] = field(default_factory=dict)

    async def type(self, prompts_per_s: float, seconds: float) -> None:
        end_s = time.perf_counter() + seconds
        due_s = time.perf_counter() + random.uniform(0, 1 / prompts_per_s)
        while due_s < end_s:
            await asyncio.sleep(due_s - time.perf_counter())
            self._sent_s[self.num_prompts] = due_s
            await self._send({"type": "generate", "seq": self.num_prompts, "prompt": next(self.prompts)})
            self.num_prompts += 1
            due_s += 1 / prompts_per_s

    async def listen(self) -> None:
        try:
            async for message in self.socket:
                if isinstance(message, bytes):
                    await self._see(message)
                else:
                    self._hear(json.loads(message))
        except ConnectionClosed as closed:
            self.errors[f"closed: {closed}"] += 1

    async def _see(self, frame: bytes) -> None:
        header = parse_header(frame)
        self.latencies_ms.append((time.perf_counter() - self._sent_s[header["seq"]]) * 1000)
        await self._send({"type": "ack", "frame": header["frame"]})

    def _hear(self, message: Mapping[str, Any]) -> None:
        match message["type"]:
            case "queued":
                pass
            case "superseded":
                self.num_superseded += 1
            case other:
                self.errors[f"{other}: {message.get('error', {}).get('code')}"] += 1

    async def _send(self, message: Mapping[str, Any]) -> None:
        await self.socket.send(json.dumps(message))
