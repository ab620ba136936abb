"""The settings that gateway and worker share, and how both read theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

ENV_PREFIX = "FEWSTEP_"


class SettingsError(Exception):
    """Settings that can't be used: one line that names the key, the value and what to do."""


class SharedSettings(BaseSettings):
    """Frozen and checked when built; `load` turns pydantic's report into one line."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True)

    redis_url: str = "redis://127.0.0.1:6379/0"
    redis_prefix: str = Field(default="fewstep", min_length=1)
    extra_catalog: Path | None = Field(default=None, description="models and LoRAs beside those that ship")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("extra_catalog", mode="before")
    @classmethod
    def _no_name_is_no_file(cls, value: object) -> object:
        return None if value == "" else value

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Settings from the environment, `overrides` first. Raises SettingsError."""
        try:
            return cls(**overrides)
        except ValidationError as error:
            first = error.errors()[0]
            key = f"{ENV_PREFIX}{'.'.join(str(part) for part in first['loc'])}".upper()
            value = "(hidden)" if cls._is_secret(first["loc"][0]) else repr(first["input"])
            raise SettingsError(f"{key}={value}: {first['msg']}") from error

    @classmethod
    def _is_secret(cls, name: int | str) -> bool:
        field = cls.model_fields.get(str(name))
        return field is not None and "SecretStr" in str(field.annotation)
