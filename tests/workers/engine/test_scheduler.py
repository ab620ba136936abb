from dataclasses import dataclass

from workers.engine.scheduler import Scheduler


@dataclass(eq=False)
class Request:
    name: str
    group: str = "g"
    num_rows: int = 1
    model: str = "m"


def make_scheduler(max_rows: int = 4) -> Scheduler[Request]:
    return Scheduler({"m": max_rows, "n": max_rows})


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


def test_groups_take_turns() -> None:
    scheduler = make_scheduler()
    add(scheduler, Request("a", "g"), Request("b", "h"), Request("c", "g"))
    assert [names(scheduler) for _ in range(4)] == [["a", "c"], ["b"], ["a", "c"], ["b"]]


def test_a_new_group_gets_the_next_turn() -> None:
    scheduler = make_scheduler()
    add(scheduler, Request("a", "g"))
    for _ in range(3):
        names(scheduler)
    add(scheduler, Request("b", "h"))
    assert names(scheduler) == ["b"]


def test_put_back_goes_to_the_head_of_the_waiting_room() -> None:
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


def test_groups_that_are_gone_are_forgotten() -> None:
    scheduler = make_scheduler()
    add(scheduler, Request("stays", "s"))
    for number in range(20):
        passing = Request(f"{number}", f"{number}")
        add(scheduler, passing)
        names(scheduler)
        names(scheduler)
        scheduler.remove(passing)
    assert len(scheduler._last_turn) <= 2
