"""A proxy in front of a gateway that cuts connections, as a network would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class CuttingProxy:
    """Before the next answers that contain one of `words`, the connection breaks: the gateway did it, nobody hears.

    `asked` collects what went to the gateway.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self.words: list[bytes] = []
        self.asked: list[bytes] = []
        self.url = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[CuttingProxy]:
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as server:
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, requests = await asyncio.open_connection("127.0.0.1", self._port)
        asking = asyncio.create_task(self._forward_requests(reader, requests))
        with suppress(ConnectionError):
            await self._forward_answers(answers, writer)
        asking.cancel()
        writer.close()
        requests.close()

    async def _forward_requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            self.asked.append(data)
            writer.write(data)

    async def _forward_answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            if cut := next((word for word in self.words if word in data), None):
                self.words.remove(cut)
                return
            writer.write(data)
            await writer.drain()
