"""What can go wrong between gateway, Redis and worker.

BrokerError
├── BrokerUnavailable        Redis can't be reached, or didn't answer in time
├── RedisNotFound            no server to start: none given, none on PATH, none bundled
├── RedisTooOld              the server is older than 6.2
├── RequestNotFound          no such request, or it is no longer kept
├── QueueFull                as many unfinished requests as `max_depth` allows
└── ResultStoreFull          the byte budget of kept results is used up
"""


class BrokerError(Exception):
    """Anything that this package raises."""


class BrokerUnavailable(BrokerError):
    """Redis can't be reached, or didn't answer in time. Worth a retry."""


class RedisNotFound(BrokerError):
    """There is no Redis server to start; the message names the ways to get one."""


class RedisTooOld(BrokerError):
    """The server is older than 6.2."""

    def __init__(self, version: str) -> None:
        super().__init__(f"Redis 6.2 or newer is needed, this server is {version}")
        self.version = version


class RequestNotFound(BrokerError):
    """No such request, or it is no longer kept."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"no request {request_id!r}, or it is no longer kept")
        self.request_id = request_id


class QueueFull(BrokerError):
    """Admission refused: `depth` requests are unfinished and `max_depth` are allowed."""

    def __init__(self, model: str, depth: int, max_depth: int) -> None:
        super().__init__(f"the queue of {model} is full: {depth} unfinished requests, {max_depth} are allowed")
        self.model, self.depth, self.max_depth = model, depth, max_depth


class ResultStoreFull(BrokerError):
    """Admission refused: finished results that are still kept fill the byte budget."""
