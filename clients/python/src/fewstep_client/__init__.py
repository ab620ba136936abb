"""Python client of fewstep: pictures over HTTP, and live over one WebSocket.

`AsyncClient` and `AsyncLive` are for asyncio. `Client` and `Live` are the same without it.
"""

from fewstep_client.errors import (
    ApiError,
    BadRequest,
    FewstepError,
    LiveClosed,
    NotDrawn,
    NotFound,
    ServerError,
    TooBusy,
    Unauthorized,
    Unreachable,
)
from fewstep_client.events import (
    Authenticated,
    Cancelled,
    Closed,
    Error,
    FinalFrame,
    Frame,
    LiveEvent,
    PreviewFrame,
    Queued,
    Ready,
    Reconnecting,
    Superseded,
)
from fewstep_client.fields import CommonFields, Fields, LiveFields, Lora, PictureFields, Refine
from fewstep_client.http import AsyncClient
from fewstep_client.live import AsyncLive
from fewstep_client.results import LiveToken, Picture, Preview, Timings
from fewstep_client.sync import Client, Live

__all__ = [
    "ApiError",
    "AsyncClient",
    "AsyncLive",
    "Authenticated",
    "BadRequest",
    "Cancelled",
    "Client",
    "Closed",
    "CommonFields",
    "Error",
    "FewstepError",
    "Fields",
    "FinalFrame",
    "Frame",
    "Live",
    "LiveClosed",
    "LiveEvent",
    "LiveFields",
    "LiveToken",
    "Lora",
    "NotDrawn",
    "NotFound",
    "Picture",
    "PictureFields",
    "Preview",
    "PreviewFrame",
    "Queued",
    "Ready",
    "Reconnecting",
    "Refine",
    "ServerError",
    "Superseded",
    "Timings",
    "TooBusy",
    "Unauthorized",
    "Unreachable",
]
