"""The typists, in a process of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK

from benchmarks.shared.figures import BenchmarkError
from benchmarks.shared.live import SUBPROTOCOL, live_url, parse_header
from benchmarks.shared.load import Window
from benchmarks.shared.prompts import endless_prompts
from benchmarks.typing.diary import Diary, Picture

# Pauses before a letter and before a word, in units of 1 / keys_per_second, which they give with these prompts.
LETTER_PAUSE, WORD_PAUSE = 0.9, 1.9
JITTER = (0.5, 1.5)
LOOK_S = (1.0, 2.0)  # before a phrase: people stop to look at the picture
PHRASE_START = re.compile(r"^|\b(?:next to|on) ")

WARM_UP_S = 2.0
LAST_PICTURE_WITHIN_S = 30.0


@dataclass(frozen=True)
class Turn:
    """What a number of typists do. `fields` go into each of their requests."""

    port: int
    mode: str
    fields: dict[str, Any]
    typists: int
    seconds: float
    keys_per_second: float
    seed: int
    waits_for_last_picture: bool = True

    @property
    def is_refined(self) -> bool:
        return "refine" in self.fields


@dataclass(frozen=True)
class Report:
    """What came of one turn."""

    window: Window
    diaries: list[Diary]
    cpu_percent: float


def run_typists(turn: Turn) -> Report:
    return asyncio.run(type_together(turn))


async def type_together(turn: Turn) -> Report:
    """Connects all typists, lets them type, and returns what they saw. Raises BenchmarkError."""
    async with contextlib.AsyncExitStack() as stack:
        url = live_url(turn.port)
        typists = [
            Typist(number, turn, await stack.enter_async_context(connect(url, subprotocols=[SUBPROTOCOL])))
            for number in range(turn.typists)
        ]
        start_s = time.perf_counter() + WARM_UP_S
        window = Window(start_s, start_s + turn.seconds)
        try:
            measuring = asyncio.create_task(measure_cpu(window))
            await asyncio.gather(measuring, *(typist.run(window) for typist in typists))
        except ConnectionClosed as closed:
            raise BenchmarkError(f"the service closed a typist's socket: {closed}") from None
    return Report(window, [typist.diary for typist in typists], measuring.result())


async def measure_cpu(window: Window) -> float:
    """Percent of all cores that are busy within the window, whoever uses them."""
    await sleep_until(window.start_s)
    psutil.cpu_percent()
    await sleep_until(window.end_s)
    return psutil.cpu_percent()


async def sleep_until(moment_s: float) -> None:
    await asyncio.sleep(max(0.0, moment_s - time.perf_counter()))


class Typist:
    """One person at a live socket: sends every change, acknowledges every picture, keeps a diary.

    This is all that a client of `fewstep.live.v1` has to do, besides showing the pictures.
    """

    def __init__(self, number: int, turn: Turn, socket: ClientConnection) -> None:
        self.diary = Diary()
        self._turn, self._socket = turn, socket
        self._name = f"typist {number} of {turn.typists}"
        self._seed = 1_000_000 + 1_000 * number  # no other typist's, so that a foreign picture is seen as one
        self._dice = random.Random(f"{turn.seed} {number}")
        self._prompts = endless_prompts(1_000 * turn.seed + number)
        self._seqs: dict[str, int] = {}
        self._has_last_picture = asyncio.Event()

    async def run(self, window: Window) -> None:
        await asyncio.gather(self._type(window), self._listen())

    # Out

    async def _type(self, window: Window) -> None:
        due_s = time.perf_counter()
        for key in type_prompts(self._prompts, self._turn.keys_per_second, self._dice):
            if key.follows_look:
                self.diary.looks.append((due_s, due_s + key.pause_s))
            due_s += key.pause_s
            await sleep_until(min(due_s, window.end_s))
            if due_s >= window.end_s:
                break
            await self._ask_for(key.text)
        if self._turn.waits_for_last_picture:
            await self._wait_for_last_picture()
        await self._socket.close()

    async def _ask_for(self, prompt: str) -> None:
        self._has_last_picture.clear()
        seq = len(self.diary.typed_s)
        self.diary.typed_s.append(time.perf_counter())
        await self._send({"type": "generate", "seq": seq, "prompt": prompt, "seed": self._seed, **self._turn.fields})

    async def _wait_for_last_picture(self) -> None:
        try:
            async with asyncio.timeout(LAST_PICTURE_WITHIN_S):
                await self._has_last_picture.wait()
        except TimeoutError:
            what = f"has no picture of the last words {LAST_PICTURE_WITHIN_S:g} s after the last key"
            raise BenchmarkError(f"{self._name} {what}") from None

    async def _send(self, message: dict[str, Any]) -> None:
        await self._socket.send(json.dumps(message))

    # In

    async def _listen(self) -> None:
        """Until the socket is closed. An acknowledgement may meet a socket that this typist has just closed."""
        with contextlib.suppress(ConnectionClosedOK):
            async for message in self._socket:
                if isinstance(message, str):
                    self._hear(json.loads(message))
                else:
                    header = parse_header(message)
                    self._see(header)
                    await self._send({"type": "ack", "frame": header["frame"]})

    def _hear(self, message: dict[str, Any]) -> None:
        match message["type"]:
            case "ready":
                pass
            case "queued":
                self._seqs[message["request_id"]] = message["seq"]
            case "superseded":
                if not message["refined"]:
                    self.diary.superseded.add(message["seq"])
            case _:
                raise BenchmarkError(f"{self._name} was told {message}")

    def _see(self, header: dict[str, Any]) -> None:
        seq = header["seq"]
        if self._seqs.get(header["request_id"]) != seq or header["seed"] != self._seed + header["index"]:
            raise BenchmarkError(f"{self._name} got a frame of another session: {header}")
        type = "refined" if header["refined"] else header["type"]
        self.diary.pictures.append(Picture(time.perf_counter(), seq, type))
        is_newest = seq == len(self.diary.typed_s) - 1
        if is_newest and type == ("refined" if self._turn.is_refined else "final"):
            self._has_last_picture.set()


@dataclass(frozen=True)
class Key:
    """One key: the pause before it and all the words after it. `follows_look`: the typist looked at the picture."""

    pause_s: float
    text: str
    follows_look: bool


def type_prompts(prompts: Iterable[str], keys_per_second: float, dice: random.Random) -> Iterator[Key]:
    """Words in bursts, a short pause before each, a long one before each phrase. A new prompt replaces the old one."""
    for prompt in prompts:
        phrase_starts = {match.start() for match in PHRASE_START.finditer(prompt)}
        for place in range(len(prompt)):
            if place in phrase_starts:
                pause_s = dice.uniform(*LOOK_S)
            else:
                pause = WORD_PAUSE if prompt[place - 1] == " " else LETTER_PAUSE
                pause_s = pause / keys_per_second * dice.uniform(*JITTER)
            yield Key(pause_s, prompt[: place + 1], place in phrase_starts)
