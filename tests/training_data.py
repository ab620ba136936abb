"""For the tests of training: small teachers of every layout, a folder of pictures, and what a run wrote and became."""

from __future__ import annotations

import csv
import json
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.training.pictures import PictureCache, encode_pictures, find_pictures
from models.training.teachers import Teacher, open_teacher
from models.training.trainer import LOG, Compute, Trainer, TrainSettings
from tests.small_models import make_sd_folder, make_sdxl_folder

CPU = torch.device("cpu")
EXACT = Compute(CPU, torch.float32)
SIZE = (32, 32)
CAPTIONS = ("a red apple", "a blue apple", "one", "two", "three apples on a background", "four")

Kind = Literal["sd", "sd-v", "sdxl"]
KINDS: tuple[Kind, ...] = ("sd", "sd-v", "sdxl")


def make_teacher(root: Path, kind: Kind) -> Teacher:
    """Of random weights: Stable Diffusion that predicts the noise, or v on a schedule with zero terminal SNR, or SDXL.
    Its folder is made under `root` when it isn't there yet."""
    folder = root / kind
    if not folder.exists():
        (make_sdxl_folder if kind == "sdxl" else make_sd_folder)(folder)
        if kind == "sd-v":
            change_config(folder / "scheduler", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    return open_teacher(str(folder), {})


def change_config(folder: Path, **changes: Any) -> None:
    """Of a network or a scheduler; None takes a key out."""
    (path,) = (path for path in folder.glob("*config.json"))
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def write_pictures(folder: Path) -> Path:
    """Six small pictures of different shapes, each of a colour of its own, listed in a metadata.jsonl."""
    folder.mkdir(parents=True)
    lines = []
    for number, caption in enumerate(CAPTIONS):
        noise = np.random.default_rng(number).integers(0, 40, (40 + 4 * number, 60, 3), dtype=np.uint8)
        Image.fromarray(noise + np.uint8(35 * number)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def make_batches(root: Path, teacher: Teacher, batch_size: int = 4, dropout: float = 0.25) -> PictureCache:
    """Of the six pictures, encoded by this teacher under `root`."""
    pictures = root / "pictures"
    if not pictures.exists():
        write_pictures(pictures)
    encoders = teacher.load_encoders(CPU)
    folder = encode_pictures(find_pictures(pictures), encoders, SIZE, root / "cache")
    return PictureCache(folder, batch_size, dropout)


def settings(steps: int, rate: float = 3e-3, **changes: Any) -> TrainSettings:
    values: dict[str, Any] = {"warmup": 3, "ema_decay": 0.8, "save_every": 1000, "log_every": 1, "weight_decay": 0}
    return TrainSettings(steps=steps, rate=rate, **(values | changes))


class Training(Protocol):
    """Of whatever kind."""

    trainer: Trainer

    def loss(self, step: int, /) -> Tensor: ...


def on_one_batch(training: Training) -> Callable[[int], Tensor]:
    """Its loss, of the same pictures and the same noise at each step."""

    def loss(step: int) -> Tensor:
        torch.manual_seed(0)
        training.trainer.rng.seed(0)
        return training.loss(step)

    return loss


def losses(folder: Path, column: str = "loss") -> list[float]:
    """What the log says."""
    with (folder / LOG).open() as file:
        return [float(row[column]) for row in csv.DictReader(file)]


def first_and_last(folder: Path, column: str = "loss") -> tuple[float, float]:
    """The means of the first and of the last fifth of the losses."""
    values = losses(folder, column)
    fifth = max(1, len(values) // 5)
    return sum(values[:fifth]) / fifth, sum(values[-fifth:]) / fifth


def assert_lower(folder: Path, share: float, column: str = "loss") -> None:
    """The last losses are less than this share of the first."""
    first, last = first_and_last(folder, column)
    assert last < share * first


def assert_same_tensors(ones: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    assert ones.keys() == others.keys()
    for name, tensor in ones.items():
        assert torch.equal(tensor, others[name]), name


def assert_same_training(one: Trainer, other: Trainer) -> None:
    """As far as each other: weights, averages, and buffers such as those of a normalization."""
    assert one.step == other.step
    assert_same_tensors(one.model.state_dict(), other.model.state_dict())
    with one.averaged_weights(), other.averaged_weights():
        assert_same_tensors(one.model.state_dict(), other.model.state_dict())


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
