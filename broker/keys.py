"""Every Redis key, in one place, for Python and for Lua.

All keys of one installation stand under one prefix: `fewstep:job:<request_id>`. A prefix in braces (`{fewstep}`) keeps
them on one slot of a cluster, which the scripts need.
"""

from __future__ import annotations

from dataclasses import dataclass

GROUP = "workers"  # the consumer group of every ready stream

_KINDS: dict[str, tuple[str, ...]] = {
    # requests
    "job": ("request_id",),  # hash: the job as JSON and everything that the scripts know of it
    "events": ("request_id",),  # stream: its log, numbered from 1
    "session": ("session",),  # hash: what a live connection has running and waiting, and where its place is
    # order
    "line": ("lane", "model", "owner"),  # list of places: one caller's waiting work, first come first served
    "ring": ("lane", "model"),  # sorted set of the owners with a non-empty line, by the virtual time of their turn
    "times": ("lane", "model"),  # hash: the virtual time of each owner served lately; under '' the lane's clock
    "weights": (),  # hash: an owner's share beside others, 1 unless given
    "turns": ("model",),  # where the lanes' round robin stands
    "ready": ("model",),  # stream, group `workers`: about the next batch
    "target": ("model",),  # how deep the ready stream is kept, raised by what workers ask for
    "depth": ("model",),  # hash: unfinished requests, `queued` and `running`, and the work that waits, `queued_us`
    "pace": ("model",),  # hash: work started and time taken for it lately, while there was more to do
    "returns": ("model",),  # when the next one that is refused shall come back, in ms
    "deadlines": (),  # sorted set of unfinished requests with a deadline, by that
    "models": (),  # set of the models that have a ready stream
    # messages
    "replies": ("gateway_id",),  # stream: events for one gateway
    "control": ("worker_id",),  # stream: aborts for one worker
    # workers
    "worker": ("worker_id",),  # its last heartbeat, as JSON
    "workers": (),  # sorted set of the live ones, by the end of their heartbeat
    # results
    "idempotency": ("owner", "digest"),  # the request of an idempotency key, and the fingerprint of its body
    "same": ("digest",),  # the newest request for the very same picture
    "kept": (),  # sorted set of kept results and their bytes, by the time they end
    "spare": (),  # the same, by the time from which they are promised to nobody
    "kept_bytes": (),  # the sum of it
    "rates": (),  # what the keys of callers' budgets start with
    "secret": (),  # what all gateways sign tokens with, unless a setting says
    "dead": (),  # stream: requests that lost three workers
}


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys under one prefix that Python itself uses; the scripts build theirs from the same table."""

    prefix: str

    def ready(self, model: str) -> str:
        return self.build("ready", model)

    def depth(self, model: str) -> str:
        return self.build("depth", model)

    def replies(self, gateway_id: str) -> str:
        return self.build("replies", gateway_id)

    def control(self, worker_id: str) -> str:
        return self.build("control", worker_id)

    def dead(self) -> str:
        return self.build("dead")

    def rates(self) -> str:
        return self.build("rates")

    def secret(self) -> str:
        return self.build("secret")

    def build(self, kind: str, *parts: str) -> str:
        if len(parts) != len(_KINDS[kind]):
            raise ValueError(f"a {kind!r} key is made of {_KINDS[kind]}, not of {parts}")
        return ":".join((self.prefix, kind, *parts))


def lua_key_functions() -> str:
    """One Lua function per kind, `job_key(request_id)` and so on. A script's KEYS[1] is the prefix."""
    functions = (_lua_key_function(kind, parts) for kind, parts in _KINDS.items())
    return "\n".join((f"local GROUP = '{GROUP}'", *functions))


def _lua_key_function(kind: str, parts: tuple[str, ...]) -> str:
    tail = "".join(f" .. ':' .. {part}" for part in parts)
    return f"local function {kind}_key({', '.join(parts)}) return KEYS[1] .. ':{kind}'{tail} end"
