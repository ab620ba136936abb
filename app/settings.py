"""What a gateway can be told, by FEWSTEP_* variables or by arguments."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from broker.settings import SettingsError, SharedSettings
from models.catalog import CATALOG_PATH

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

Names = Annotated[tuple[str, ...], NoDecode]


class GatewaySettings(SharedSettings):
    """Sizes are bytes, times end in `_s` or `_ms`.

    `allowed_origins` are further origins ("https://example.org") that may open a live socket, `cors_origins` those
    whose pages may call the API, `allowed_hosts` further names that the Host header may carry, `trusted_proxies`
    addresses whose X-Forwarded-For and -Proto count; all may be comma-separated. `prompt_check` is
    "package.module:function".
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)

    catalog: Path = CATALOG_PATH
    default_model: str = "mini-lcm"
    max_depth: int = Field(default=1000, ge=1)
    max_result_bytes: int = Field(default=512 * 2**20, ge=2**20)
    max_body_bytes: int = Field(default=64 * 2**10, ge=1024)
    max_header_bytes: int = Field(default=32 * 2**10, ge=1024)
    max_connections: int = Field(default=2000, ge=1)
    header_timeout_s: float = Field(default=10, gt=0)
    body_timeout_s: float = Field(default=20, gt=0)
    send_timeout_s: float = Field(default=30, gt=0)
    keep_alive_s: int = Field(default=5, ge=1)
    sync_wait_s: float = Field(default=60, gt=0, le=3600)
    keep_sync_s: float = Field(default=60, ge=0)
    keep_async_s: float = Field(default=600, gt=0)
    cache_s: float = Field(default=600, ge=0)
    public_url: str | None = Field(default=None, pattern=r"^https?://[^/?#]+(/[^?#]*)?$")
    shutdown_s: int = Field(default=5, ge=0)

    max_live_connections: int = Field(default=200, ge=1)
    live_max_message_bytes: int = Field(default=64 * 2**10, ge=1024)
    live_max_messages_per_s: float = Field(default=100, gt=0)
    live_max_unacked: int = Field(default=2, ge=1)
    live_idle_s: float = Field(default=300, gt=0)
    live_send_timeout_s: float = Field(default=5, gt=0)
    live_ping_s: float = Field(default=20, gt=0)
    live_reconnect_in_ms: int = Field(default=1000, ge=0)

    prompt_check: str | None = None
    prompt_check_timeout_s: float = Field(default=2, gt=0, le=60)

    api_keys_file: Path | None = None
    api_keys: str | None = None
    allow_anonymous: bool = False
    secret: Annotated[SecretStr, Field(min_length=32)] | None = None
    live_auth_timeout_s: float = Field(default=5, gt=0)
    live_token_max_ttl_s: int = Field(default=3600, ge=1)

    allowed_origins: Names = ()
    cors_origins: Names = ()
    allowed_hosts: Names = ()
    trusted_proxies: Names = ()

    @property
    def has_keys(self) -> bool:
        """Whether anything asks callers who they are."""
        return bool(self.api_keys or self.api_keys_file)

    @field_validator("api_keys_file", "api_keys", "secret", mode="before")
    @classmethod
    def _nothing_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("allowed_origins", "cors_origins", "allowed_hosts", "trusted_proxies", mode="before")
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


def open_loopback(settings: GatewaySettings) -> GatewaySettings:
    """Lets everyone in where only this machine can come, no keys are set and nobody has said otherwise."""
    is_decided = settings.has_keys or "allow_anonymous" in settings.model_fields_set
    if is_decided or not is_loopback(settings.host):
        return settings
    return settings.model_copy(update={"allow_anonymous": True})


def check_exposure(settings: GatewaySettings) -> None:
    """Refuses to serve without a word on who may come in."""
    if settings.has_keys or settings.allow_anonymous:
        return
    raise SettingsError(
        f"no API keys are set: make one with fewstep keys create and name its file in FEWSTEP_API_KEYS_FILE, "
        f"or set FEWSTEP_ALLOW_ANONYMOUS=1 to let everyone in who can reach FEWSTEP_HOST={settings.host!r}"
    )


def check_room(settings: GatewaySettings) -> None:
    """Refuses more live sockets than there may be connections at all."""
    if settings.max_live_connections > settings.max_connections:
        raise SettingsError(
            f"FEWSTEP_MAX_LIVE_CONNECTIONS={settings.max_live_connections}: live sockets are connections, and "
            f"FEWSTEP_MAX_CONNECTIONS allows {settings.max_connections}"
        )
