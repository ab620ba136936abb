"""API keys for the gateway's tests."""

from __future__ import annotations

from pathlib import Path

from app.access.key_file import add_key, make_key, new_record, remove_key


class Keys:
    """A file of keys for one gateway."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "keys.toml"

    def make(self, **fields: object) -> str:
        key_id, key = make_key()
        add_key(self.path, new_record(key, **fields), key_id)
        return key

    def revoke(self, key: str) -> None:
        remove_key(self.path, id_of(key))


def id_of(key: str) -> str:
    return key.split("_")[1]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
