"""A proxy in front of Redis that does the command but loses its reply, as a network would."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self


class FaultProxy:
    """Forwards bytes between a TCP port and Redis' unix socket.

    `lose_reply_to(word)`: the next request that contains `word` reaches Redis; its reply doesn't reach the client,
    whose connection breaks instead.
    """

    def __init__(self, socket_path: str) -> None:
        self._socket_path = socket_path
        self._words: list[bytes] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_lost = 0

    def lose_reply_to(self, word: str, times: int = 1) -> None:
        self._words += [word.encode()] * times

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, client_reader: asyncio.StreamReader, client_writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        redis_reader, redis_writer = await asyncio.open_unix_connection(self._socket_path)
        loses_reply = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                replies = group.create_task(self._forward_replies(redis_reader, client_writer, loses_reply))
                await self._forward_requests(client_reader, redis_writer, loses_reply)
                replies.cancel()
        except* ConnectionError:
            pass
        finally:
            redis_writer.close()
            client_writer.close()

    async def _forward_requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, loses_reply: asyncio.Event
    ) -> None:
        while data := await reader.read(2**20):
            if self._words and self._words[0] in data:
                self._words.pop(0)
                loses_reply.set()
            writer.write(data)
            await writer.drain()

    async def _forward_replies(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, loses_reply: asyncio.Event
    ) -> None:
        while data := await reader.read(2**20):
            if loses_reply.is_set():
                self.num_lost += 1
                writer.close()
                return
            writer.write(data)
            await writer.drain()
