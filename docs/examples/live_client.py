"""Types a prompt, key by key, as a person would, and keeps the picture of the whole sentence.

pip install ./clients/python && python docs/examples/live_client.py http://127.0.0.1:8000
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from fewstep_client import AsyncLive, Closed, Error, FinalFrame, PreviewFrame, Reconnecting, Refine, Superseded

PROMPT = "a red apple on a blue background"
KEYS_PER_S = 20


async def type_prompt(live: AsyncLive) -> None:
    """Every change is sent; the service draws the newest."""
    for length in range(1, len(PROMPT) + 1):
        live.generate(PROMPT[:length], refine=Refine(after_ms=300, num_inference_steps=8))
        await asyncio.sleep(1 / KEYS_PER_S)


async def watch(live: AsyncLive) -> None:
    async for event in live:
        match event:
            case PreviewFrame() | FinalFrame(refined=False):
                print(f"{PROMPT[: event.seq]!r} after step {event.step} of {event.num_inference_steps}")
            case FinalFrame(seq=seq) if seq == len(PROMPT):
                save(event)
                print(f"refined, in {event.timings.total_ms:.0f} ms; seed {event.seed} draws it again")
                return
            case Superseded():
                print(f"{PROMPT[: event.seq]!r} gave way to newer words")
            case Error() | Reconnecting() | Closed():
                print(event)


def save(frame: FinalFrame) -> None:
    Path(f"apple.{frame.format}").write_bytes(frame.data)


async def main(url: str) -> None:
    async with AsyncLive(url) as live, asyncio.TaskGroup() as tasks:
        tasks.create_task(type_prompt(live))
        tasks.create_task(watch(live))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
