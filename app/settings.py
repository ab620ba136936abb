"""What a gateway can be told, by FEWSTEP_* variables or by arguments."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from broker.settings import SettingsError, SharedSettings
from models.catalog import CATALOG_PATH

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

Names = Annotated[tuple[str, ...], NoDecode]


class GatewaySettings(SharedSettings):
    """Sizes are bytes, times end in `_s` or `_ms`.

    `allowed_origins` are further origins ("https://example.org") that may open a live socket, `allowed_hosts` further
    names that the Host header may carry; both may be comma-separated.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)

    catalog: Path = CATALOG_PATH
    default_model: str = "mini-lcm"
    max_depth: int = Field(default=1000, ge=1)
    max_result_bytes: int = Field(default=512 * 2**20, ge=2**20)
    max_body_bytes: int = Field(default=64 * 2**10, ge=1024)
    max_header_bytes: int = Field(default=32 * 2**10, ge=1024)
    max_connections: int = Field(default=900, ge=1)
    header_timeout_s: float = Field(default=10, gt=0)
    body_timeout_s: float = Field(default=20, gt=0)
    send_timeout_s: float = Field(default=30, gt=0)
    keep_alive_s: int = Field(default=5, ge=1)
    sync_wait_s: float = Field(default=60, gt=0, le=3600)
    keep_sync_s: float = Field(default=60, ge=0)
    keep_async_s: float = Field(default=600, gt=0)
    shutdown_s: int = Field(default=5, ge=0)

    max_live_connections: int = Field(default=200, ge=1)
    live_max_message_bytes: int = Field(default=64 * 2**10, ge=1024)
    live_max_messages_per_s: float = Field(default=100, gt=0)
    live_max_unacked: int = Field(default=2, ge=1)
    live_idle_s: float = Field(default=300, gt=0)
    live_send_timeout_s: float = Field(default=5, gt=0)
    live_ping_s: float = Field(default=20, gt=0)
    live_reconnect_in_ms: int = Field(default=1000, ge=0)

    allow_anonymous: bool = False
    allowed_origins: Names = ()
    allowed_hosts: Names = ()

    @field_validator("allowed_origins", "allowed_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip().rstrip("/") for part in value.split(",") if part.strip())
        return value


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host` (a name or an address, with or without brackets)."""
    bare = host.strip("[]").lower()
    if bare in LOOPBACK_NAMES:
        return True
    try:
        return ip_address(bare).is_loopback
    except ValueError:
        return False


def check_exposure(settings: GatewaySettings) -> None:
    """Refuses a host that others can reach while nothing asks who they are."""
    if is_loopback(settings.host) or settings.allow_anonymous:
        return
    raise SettingsError(
        f"FEWSTEP_HOST={settings.host!r} is open to the network and no API keys are set: "
        "bind to 127.0.0.1, or set FEWSTEP_ALLOW_ANONYMOUS=1 to let everyone in"
    )
