"""What clients of `fewstep.live.v1` share."""

from __future__ import annotations

import json
from typing import Any

from websockets.typing import Subprotocol

SUBPROTOCOL = Subprotocol("fewstep.live.v1")


def live_url(port: int) -> str:
    return f"ws://127.0.0.1:{port}/v1/live"


def parse_header(frame: bytes) -> dict[str, Any]:
    """What a binary frame says of its picture."""
    end = 4 + int.from_bytes(frame[:4], "big")
    header: dict[str, Any] = json.loads(frame[4:end])
    return header
