"""What can go wrong between gateway, Redis and worker.

BrokerError
├── BrokerUnavailable        Redis can't be reached, or didn't answer in time
├── RedisNotFound            no server to start: none given, none on PATH, none bundled
├── RedisTooOld              the server is older than 6.2
├── RequestNotFound          no such request, or it is no longer kept
├── QueueFull                as many unfinished requests as `max_depth` allows
├── ResultStoreFull          the byte budget of kept results is used up
├── TooLate                  the predicted end lies after the deadline
└── IdempotencyConflict      the key was used before, for another request
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
    """Admission refused: `depth` requests are unfinished and `max_depth` are allowed. Come back in `wait_ms`."""

    def __init__(self, model: str, depth: int, max_depth: int, *, wait_ms: int) -> None:
        super().__init__(f"the queue of {model} is full: {depth} unfinished requests, {max_depth} are allowed")
        self.model, self.depth, self.max_depth, self.wait_ms = model, depth, max_depth, wait_ms


class ResultStoreFull(BrokerError):
    """Admission refused: results that are promised fill the byte budget. Come back in `wait_ms`."""

    def __init__(self, num_bytes: int, max_bytes: int, *, wait_ms: int) -> None:
        super().__init__(f"{num_bytes} bytes of results are kept, {max_bytes} are allowed")
        self.wait_ms = wait_ms


class TooLate(BrokerError):
    """Admission refused: only `finish_ms` from now would the picture surely be done. Come back in `wait_ms`."""

    def __init__(self, finish_ms: int, deadline_ms: int, *, wait_ms: int) -> None:
        super().__init__(f"the picture would surely be done in {finish_ms} ms, the deadline is {deadline_ms} ms")
        self.finish_ms, self.deadline_ms, self.wait_ms = finish_ms, deadline_ms, wait_ms


class IdempotencyConflict(BrokerError):
    """The idempotency key belongs to another request of the same owner."""

    def __init__(self) -> None:
        super().__init__("the idempotency key was used before for another request")
