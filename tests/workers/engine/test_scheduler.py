from dataclasses import dataclass, field
from itertools import count

from workers.engine.scheduler import Scheduler


@dataclass(eq=False)
class Request:
    name: str
    group: str = "g"
    num_rows: int = 1
    due_s: float = field(default_factory=count().__next__)
    model: str = "m"
    loras: str = ""
    is_ready: bool = True


def make_scheduler(max_rows: int = 4) -> Scheduler[Request]:
    return Scheduler(lambda _: max_rows)


def add(scheduler: Scheduler[Request], *requests: Request) -> None:
    for request in requests:
        scheduler.add(request)


def names(scheduler: Scheduler[Request]) -> list[str]:
    batch = scheduler.schedule()
    return [] if batch is None else [request.name for request in batch.requests]


def test_nothing_to_do() -> None:
    assert make_scheduler().schedule() is None


def test_requests_join_the_running_batch_at_the_next_step() -> None:
    scheduler = make_scheduler()
    add(scheduler, Request("a"))
    assert names(scheduler) == ["a"]
    add(scheduler, Request("b"))
    batch = scheduler.schedule()
    assert batch is not None
    assert [request.name for request in batch.requests] == ["a", "b"]
    assert [request.name for request in batch.admitted] == ["b"]


def test_rows_are_bounded_and_freed_rows_go_to_waiting_requests_at_once() -> None:
    scheduler = make_scheduler(max_rows=2)
    a, b, c = Request("a"), Request("b"), Request("c")
    add(scheduler, a, b, c)
    assert names(scheduler) == ["a", "b"]
    scheduler.remove(a)
    assert names(scheduler) == ["b", "c"]


def test_a_wide_request_is_not_overtaken_for_ever() -> None:
    scheduler = make_scheduler(max_rows=2)
    a, wide = Request("a"), Request("wide", num_rows=2)
    add(scheduler, a)
    assert names(scheduler) == ["a"]
    add(scheduler, wide, Request("late"))
    assert names(scheduler) == ["a"]
    scheduler.remove(a)
    assert names(scheduler) == ["wide"]


def test_the_group_with_the_most_urgent_request_runs() -> None:
    scheduler = make_scheduler()
    first, second, third = (
        Request("first", "g", due_s=5),
        Request("second", "h", due_s=3),
        Request("third", "g", due_s=9),
    )
    add(scheduler, first, second, third)
    assert names(scheduler) == ["second"]
    scheduler.remove(second)
    assert names(scheduler) == ["first", "third"]


def test_no_group_starves_however_much_comes_for_another() -> None:
    """A flood that is due soon after it comes runs before a patient request only until that one is due itself."""
    scheduler = make_scheduler(max_rows=1)
    patient = Request("patient", "h", due_s=10)
    add(scheduler, patient)
    served: list[str] = []
    for now in range(20):
        hasty = Request("hasty", due_s=now + 2)
        add(scheduler, hasty)
        served += names(scheduler)
        for request in scheduler.running[:]:
            scheduler.remove(request)
    assert 8 <= served.index("patient") <= 11


def test_the_most_urgent_joins_first() -> None:
    scheduler = make_scheduler(max_rows=1)
    add(scheduler, Request("patient", due_s=9), Request("hasty", due_s=1))
    assert names(scheduler) == ["hasty"]


def test_limits_belong_to_requests() -> None:
    scheduler: Scheduler[Request] = Scheduler(lambda request: 1 if request.group == "large" else 3)
    add(
        scheduler, *(Request(f"{i}", "large", due_s=1) for i in range(2)), *(Request(f"{i}", due_s=2) for i in range(4))
    )
    assert names(scheduler) == ["0"]
    for request in [*scheduler.running, *scheduler.waiting]:
        if request.group == "large":
            scheduler.remove(request)
    assert names(scheduler) == ["0", "1", "2"]


def test_who_is_put_back_keeps_its_urgency() -> None:
    scheduler = make_scheduler(max_rows=1)
    a, b = Request("a"), Request("b")
    add(scheduler, a, b)
    assert names(scheduler) == ["a"]
    scheduler.put_back(a)
    assert names(scheduler) == ["a"]


def test_a_request_wider_than_any_batch_goes_alone() -> None:
    scheduler = make_scheduler(max_rows=2)
    add(scheduler, Request("a"), Request("wide", num_rows=3), Request("b"))
    assert names(scheduler) == ["a"]
    scheduler.remove(scheduler.running[0])
    assert names(scheduler) == ["wide"]
