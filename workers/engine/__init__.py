"""Step-level batching of diffusion requests: no Redis, no HTTP, no asyncio.

request remembers, scheduler decides, runner computes, engine conducts.
"""

from workers.engine.engine import Engine
from workers.engine.outputs import Aborted, Blocked, EngineOutput, Finished, GenerationFailed, PreviewReady

__all__ = ["Aborted", "Blocked", "Engine", "EngineOutput", "Finished", "GenerationFailed", "PreviewReady"]
