"""The loop: what it averages and keeps, and that a broken run ends where an unbroken one does."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.training.errors import CheckpointError, Diverged, Interrupted
from models.training.trainer import CHECKPOINT, LOG, Trainer, TrainSettings
from tests.training_data import assert_same_training, full_disk, losses, settings


def make_trainer(out: Path, plan: TrainSettings, **identity: object) -> Trainer:
    """One trained layer on a frozen one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4))
    return Trainer(model, out, plan, identity=identity)


def loss_of(trainer: Trainer) -> Callable[[int], Tensor]:
    """On noise of torch's own and of the trainer's."""

    def loss(_step: int) -> Tensor:
        output: Tensor = trainer.model(torch.randn(8, 4) + trainer.rng.random())
        return ((output - 1) ** 2).mean()

    return loss


def run(out: Path, *untils: int | None, plan: TrainSettings | None = None) -> Trainer:
    """As many trainers one after another as there are ends."""
    for until in untils:
        trainer = make_trainer(out, plan or settings(9))
        trainer.fit(loss_of(trainer), until=until)
    return trainer


def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    assert_same_training(run(tmp_path / "one", None), run(tmp_path / "two", 4, 5, None))


def test_what_is_drawn_at_a_checkpoint_changes_nothing(tmp_path: Path) -> None:
    plan = settings(9, save_every=2)
    noise: list[Tensor] = []
    quiet, noisy = (make_trainer(tmp_path / name, plan) for name in ("quiet", "noisy"))
    torch.manual_seed(1)
    quiet.fit(loss_of(quiet))
    torch.manual_seed(1)
    noisy.fit(loss_of(noisy), on_save=lambda: noise.append(torch.randn(100)))
    assert len(noise) == 5
    assert_same_training(quiet, noisy)


def test_several_batches_make_one_step(tmp_path: Path) -> None:
    """Of the same batch: as one."""
    batch = torch.randn(8, 4)

    def run_on_batch(out: Path, number: int) -> None:
        trainer = make_trainer(out, settings(5, accumulate=number))
        trainer.fit(lambda _: (trainer.model(batch) ** 2).mean())

    run_on_batch(tmp_path / "one", 1)
    run_on_batch(tmp_path / "three", 3)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "three"), rel=1e-5)


def test_weights_with_a_clip_of_their_own_are_clipped_by_their_own_norm(tmp_path: Path) -> None:
    small, large = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)
    groups: list[dict[str, Any]] = [
        {"params": list(small.parameters())},
        {"params": list(large.parameters()), "clip": 2.0},
    ]
    trainer = Trainer(nn.ModuleDict({"small": small, "large": large}), tmp_path, settings(1), groups)
    trainer.fit(lambda _step: 0.1 * small(torch.ones(3)).sum() + 1000 * large(torch.ones(3)).sum())
    assert small.weight.grad is not None
    assert large.weight.grad is not None
    assert torch.allclose(small.weight.grad, torch.full((1, 3), 0.1))
    assert float(large.weight.grad.norm()) == pytest.approx(2.0, rel=1e-3)


def test_averages_follow_slowly_and_change_places_with_the_weights(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, settings(30))
    before = trainer.model[1].weight.detach().clone()
    trainer.fit(loss_of(trainer))
    after = trainer.model[1].weight.detach().clone()
    with trainer.averaged_weights():
        average = trainer.model[1].weight.detach().clone()
    assert torch.equal(trainer.model[1].weight, after)
    assert float((average - before).norm()) < float((after - before).norm())
    assert not torch.equal(average, before)
    assert torch.equal(trainer.keep_average()[1].weight, average)


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(tmp_path: Path) -> None:
    run(tmp_path, 2)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert set(state["model"]) == set(state["averages"]["averages"]) == {"1.weight", "1.bias"}


@pytest.fixture
def plain_ctrl_c() -> Iterator[None]:
    """Python's own, whatever an event loop of another test has set."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("plain_ctrl_c")
def test_ctrl_c_writes_a_checkpoint_and_the_run_goes_on_there(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "broken", settings(9))
    saved = []

    def interrupted_loss(step: int) -> Tensor:
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return loss_of(trainer)(step)

    with pytest.raises(Interrupted, match="stopped at step 4 of 9; its checkpoint is written"):
        trainer.fit(interrupted_loss, on_save=lambda: saved.append(trainer.step))
    assert saved == [4]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same_training(run(tmp_path / "broken", None), run(tmp_path / "unbroken", None))


@pytest.mark.usefixtures("plain_ctrl_c")
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, settings(9))

    def interrupted_loss(step: int) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError(step)

    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.fit(interrupted_loss)
    assert not isinstance(caught.value, Interrupted)
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (settings(9, rate=1e-4), "rate = 0.003, and now it is 0.0001"),
        (settings(10), "steps = 9, and now it is 10"),
        (settings(9, seed=1), "seed = 0, and now it is 1"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path, changed: TrainSettings, reason: str) -> None:
    run(tmp_path, 2)
    with pytest.raises(CheckpointError, match=f"{tmp_path / CHECKPOINT} was written with {reason}: give the same"):
        make_trainer(tmp_path, changed)


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, settings(9), data="pictures")
    trainer.fit(loss_of(trainer), until=2)
    with pytest.raises(CheckpointError, match="was written with data = pictures, and now it is others"):
        make_trainer(tmp_path, settings(9), data="others")


def test_how_often_is_saved_and_logged_may_change(tmp_path: Path) -> None:
    run(tmp_path, 2)
    assert make_trainer(tmp_path, settings(9, save_every=1, log_every=3)).step == 2


def test_the_log_forgets_steps_that_a_crash_undid(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, settings(9))

    def crashing_loss(step: int) -> Tensor:
        if step == 5:
            raise RuntimeError
        return loss_of(trainer)(step)

    trainer.fit(crashing_loss, until=3)
    with pytest.raises(RuntimeError):
        trainer.fit(crashing_loss)
    run(tmp_path, None)
    steps = [int(row.split(",")[0]) for row in (tmp_path / LOG).read_text().splitlines()[1:]]
    assert steps == list(range(1, 10))


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, settings(9))
    with pytest.raises(Diverged, match=r"the loss is nan at step 1: try a lower rate than 0\.003"):
        trainer.fit(lambda _: trainer.model(torch.full((1, 4), float("nan"))).mean())
    assert not (tmp_path / CHECKPOINT).exists()


def test_weights_that_are_no_numbers_are_neither_kept_nor_shown(tmp_path: Path) -> None:
    """The last step's loss was a number, and no step was logged."""
    trainer = make_trainer(tmp_path, settings(2, rate=float("inf"), log_every=20))
    shown: list[int] = []
    with pytest.raises(Diverged, match=r"weights are no numbers at step 2: try a lower rate than inf"):
        trainer.fit(loss_of(trainer), on_save=lambda: shown.append(trainer.step))
    assert not (tmp_path / CHECKPOINT).exists()
    assert not shown


def test_a_full_disk_leaves_the_former_checkpoint(tmp_path: Path) -> None:
    trainer = run(tmp_path, 2)
    former = (tmp_path / CHECKPOINT).read_bytes()
    with (
        full_disk(1000),
        pytest.raises(CheckpointError, match=r"checkpoint\.pt\.part can't be written; is the disk full"),
    ):
        trainer.save()
    assert (tmp_path / CHECKPOINT).read_bytes() == former
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT, LOG}


@pytest.mark.parametrize("share", [0.0, 0.5, None])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, share: float | None) -> None:
    run(tmp_path, 2)
    path = tmp_path / CHECKPOINT
    whole = path.read_bytes()
    path.write_bytes(b"no checkpoint" if share is None else whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=f"{path} can't be read as a checkpoint; delete it to begin anew"):
        make_trainer(tmp_path, settings(9))


@pytest.mark.parametrize("kept", [0, 3, 40])
def test_a_log_that_breaks_off_goes_on(tmp_path: Path, kept: int) -> None:
    run(tmp_path, 3)
    log = tmp_path / LOG
    head = log.read_text().splitlines()[0]
    log.write_bytes(log.read_bytes()[:kept])
    run(tmp_path, None)
    first, *rows = log.read_text().splitlines()
    assert first == head
    assert [int(row.split(",")[0]) for row in rows][-6:] == list(range(4, 10))
