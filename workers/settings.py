"""What a worker can be told, by environment variables FEWSTEP_*."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

from pydantic import Field, field_validator

from broker.settings import SharedSettings
from models.catalog import CATALOG_PATH
from models.hub.lockfile import LOCK_FILE


def usual_compile_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path("~/.cache")) / "fewstep" / "compiled"


class WorkerSettings(SharedSettings):
    """Times end in `_s`."""

    models: str = Field("mini-lcm", pattern=r"[^\s,]", description="catalog entries to keep warm, separated by commas")
    catalog: Path = CATALOG_PATH
    lock_file: Path = Field(LOCK_FILE, description="commits and checksums of what comes from the Hub")
    memory_gib: float | None = Field(None, gt=0, description="for all models together; what is free if none")
    device: str = Field("auto", description="cpu, cuda, cuda:1, …; auto takes CUDA where there is one")
    dtype: str = Field("auto", pattern="^(auto|float32|bfloat16|float16)$")
    cuda_graphs: bool = Field(False, description="replay networks as CUDA graphs")
    compile: bool = Field(False, description="compile UNets while they serve, and use what was compiled before")
    compile_cache: Path = Field(
        default_factory=usual_compile_cache, description="compiled networks: machine code that nobody else may write"
    )
    max_loras: int = Field(16, ge=1, description="style LoRAs of each model that stay in memory")
    worker_metrics_host: str = "127.0.0.1"
    worker_metrics_port: int = Field(0, ge=0, le=65535, description="0: no metrics endpoint")
    lease_s: float = Field(15.0, gt=0, description="a worker silent for this long loses its requests to another")
    max_stall_s: float = Field(60.0, gt=0, description="a step that takes longer counts as hung")
    drain_s: float = Field(20.0, ge=0, description="how long running requests may finish after SIGTERM")
    encode_threads: int = Field(2, ge=1)

    @property
    def model_names(self) -> list[str]:
        """The most important one first."""
        return list(dict.fromkeys(name.strip() for name in self.models.split(",") if name.strip()))

    @field_validator("lock_file", mode="before")
    @classmethod
    def _no_name_is_the_usual_one(cls, value: object) -> object:
        return LOCK_FILE if value == "" else value

    @field_validator("compile_cache", mode="before")
    @classmethod
    def _nothing_is_the_usual_folder(cls, value: object) -> object:
        return usual_compile_cache() if value == "" else value

    @field_validator("memory_gib", mode="before")
    @classmethod
    def _nothing_is_none(cls, value: object) -> object:
        return None if value == "" else value


def new_worker_id() -> str:
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
