from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import Any

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


# LoRAs: one set of them at a time is in a model's weights


def make_turn_scheduler(switch_s: float = 1.0, max_rows: int = 4) -> Scheduler[Request]:
    """A quantum is nine times the switch, so that a tenth of the time goes into switching."""
    return Scheduler(lambda _: max_rows, lambda _: switch_s)


def styled(name: str, loras: str, **values: Any) -> Request:
    return Request(name, group=loras, loras=loras, **values)


def run(scheduler: Scheduler[Request], num_steps: int, seconds: float = 1.0) -> list[str]:
    """The LoRAs of each step; nothing ever ends."""
    seen: list[str] = []
    for _ in range(num_steps):
        batch = scheduler.schedule()
        assert batch is not None
        seen.append(batch.requests[0].loras)
        scheduler.charge(batch, seconds)
    return seen


def num_switches(seen: list[str]) -> int:
    return sum(before != after for before, after in pairwise(seen))


def test_late_groups_of_different_loras_dont_switch_at_every_step() -> None:
    """Each is late as soon as the other runs: by urgency alone they would alternate."""
    scheduler = make_turn_scheduler()
    add(scheduler, styled("a", "ink", due_s=0), styled("b", "clay", due_s=0))
    assert run(scheduler, 27) == ["ink"] * 9 + ["clay"] * 9 + ["ink"] * 9


def test_a_tenth_of_the_time_at_most_goes_into_switching() -> None:
    scheduler = make_turn_scheduler(switch_s=0.02)
    add(scheduler, *(styled(name, name) for name in ("ink", "clay", "oil", "none")))
    seconds = 0.007
    switches = num_switches(run(scheduler, 1000, seconds))
    assert switches > 20, "they all want to run"
    assert switches * 0.02 <= 0.1 * (1000 * seconds + switches * 0.02)


def test_a_turn_ends_at_once_when_nobody_wants_its_loras_any_more() -> None:
    scheduler = make_turn_scheduler()
    a, b = styled("a", "ink"), styled("b", "clay")
    add(scheduler, a, b)
    assert run(scheduler, 2) == ["ink", "ink"]
    scheduler.remove(a)
    assert run(scheduler, 1) == ["clay"]


def test_a_turn_goes_on_while_nobody_else_waits_and_the_next_one_comes_at_once() -> None:
    scheduler = make_turn_scheduler()
    add(scheduler, styled("a", "ink"))
    assert run(scheduler, 30) == ["ink"] * 30
    add(scheduler, styled("b", "clay"))
    assert run(scheduler, 1) == ["clay"]


def test_after_a_quantum_it_is_the_turn_of_the_most_urgent_of_the_others() -> None:
    scheduler = make_turn_scheduler()
    add(scheduler, styled("a", "ink", due_s=0), styled("b", "clay", due_s=9), styled("c", "oil", due_s=5))
    assert run(scheduler, 10)[-1] == "oil"


def test_who_asks_for_the_same_joins_without_waiting_for_a_turn() -> None:
    scheduler = make_turn_scheduler()
    add(scheduler, styled("a", "ink", due_s=0), styled("b", "clay", due_s=0))
    run(scheduler, 1)
    add(scheduler, styled("c", "ink", due_s=100))
    assert names(scheduler) == ["a", "c"]


def test_the_most_urgent_waits_for_one_quantum_and_one_step_at_most() -> None:
    """However much comes for the LoRAs in place."""
    scheduler = make_turn_scheduler(max_rows=1)
    patient = styled("patient", "clay", due_s=4)
    waited_s = 0.0
    for now in range(100):
        if now == 3:
            add(scheduler, patient)
        add(scheduler, styled("flood", "ink", due_s=now))
        batch = scheduler.schedule()
        assert batch is not None
        if batch.requests[0] is patient:
            break
        scheduler.charge(batch, 1.0)
        scheduler.remove(batch.requests[0])
        waited_s += now >= 3
    assert 0 < waited_s <= 9 + 1


def test_nobody_starves_among_many_sets_of_loras() -> None:
    """Due times never move: of each set with somebody more urgent the patient one waits for one turn at most."""
    scheduler = make_turn_scheduler(max_rows=1)
    add(scheduler, *(styled(f"{i}", f"{i}", due_s=i) for i in range(5)), styled("patient", "patient", due_s=5))
    seen: list[str] = []
    while "patient" not in seen:
        add(scheduler, styled("late", f"{len(seen) % 5}", due_s=6 + len(seen)))
        batch = scheduler.schedule()
        assert batch is not None
        seen.append(batch.requests[0].name)
        scheduler.charge(batch, 1.0)
        scheduler.remove(batch.requests[0])
    assert len(seen) <= 5 * 9 + 1


def test_urgency_decides_between_models_and_turns_only_within_one() -> None:
    scheduler = make_turn_scheduler()
    add(scheduler, styled("a", "ink", due_s=5), styled("b", "clay", due_s=5))
    run(scheduler, 1)
    add(scheduler, Request("other", "of another model", model="n", due_s=1))
    assert names(scheduler) == ["other"]
    scheduler.remove(scheduler.running[-1])
    add(scheduler, styled("c", "clay", due_s=1))
    assert names(scheduler) == ["a"], "the turn is ink's still"


def test_a_request_whose_lora_is_being_read_holds_nobody_up() -> None:
    scheduler = make_turn_scheduler()
    reading = styled("a", "ink", due_s=0, is_ready=False)
    add(scheduler, reading)
    assert scheduler.schedule() is None
    add(scheduler, styled("b", "clay", due_s=9))
    assert names(scheduler) == ["b"]
    reading.is_ready = True
    scheduler.remove(scheduler.running[0])
    assert names(scheduler) == ["a"]
