"""Pictures with captions, encoded once: what distillation needs of a data set lies on disk as latents and embeddings,
so that text encoders and VAE have left memory when training begins.

A folder of pictures has a `metadata.jsonl` with `file_name` and `text` a line, as Hugging Face's imagefolder has it, or
beside each picture a .txt of the same name.
"""

from __future__ import annotations

import json
import random
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from models.training.errors import PicturesError
from models.training.fingerprints import file_fingerprints, fingerprint
from models.training.teachers import Conditions, Encoders, Size
from models.training.trainer import Identity

METADATA = "metadata.jsonl"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SHARD_PICTURES = 64
VERSION = 1  # of the cache's format
CAPTION_DROPOUT = 0.1
MAX_NAMED = 3  # files that one message names


@dataclass(frozen=True)
class Batch:
    """Scaled latents `"b 4 h w"` in fp32, and what the UNet is told about each."""

    latents: Tensor
    conditions: Conditions

    def to(self, device: torch.device) -> Batch:
        return Batch(self.latents.to(device), self.conditions.to(device))


class Batches(Protocol):
    """What a distillation learns from."""

    @property
    def identity(self) -> Identity:
        """What makes these batches what they are, by the names of settings."""

    @property
    def unconditional(self) -> Conditions:
        """One row, of no caption."""

    def draw(self, rng: random.Random) -> Batch:
        """A random batch, on the CPU. What isn't drawn from `rng` is drawn from torch's default generator."""


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str


@dataclass(frozen=True)
class Prepared:
    """Pixels `"3 height width"` in -1 to 1, and SDXL's time ids: original size, top left corner, target size."""

    pixels: Tensor
    time_ids: Tensor


def find_pictures(folder: Path) -> list[Picture]:
    """All pictures of a folder with their captions, in the order of their names. Raises PicturesError."""
    if not folder.is_dir():
        raise PicturesError(f"there is no folder {folder}")
    metadata = folder / METADATA
    pictures = list(_listed(metadata)) if metadata.exists() else list(_captioned(folder))
    if not pictures:
        raise PicturesError(f"{folder} has no pictures: {', '.join(SUFFIXES)} are read")
    return sorted(pictures, key=lambda picture: picture.path)


def _listed(metadata: Path) -> Iterator[Picture]:
    for number, line in enumerate(_read_text(metadata).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, caption = str(row["file_name"]), str(row["text"])
        except (ValueError, TypeError, KeyError) as error:
            raise PicturesError(f"{metadata}, line {number}: an object with file_name and text is needed") from error
        path = metadata.parent / name
        if not path.is_file():
            raise PicturesError(f"{metadata}, line {number}: there is no file {path}")
        yield Picture(path, caption)


def _captioned(folder: Path) -> Iterator[Picture]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    lacking = [path for path in paths if not path.with_suffix(".txt").is_file()]
    if lacking:
        names = ", ".join(str(path.relative_to(folder)) for path in lacking[:MAX_NAMED])
        more = ", …" if len(lacking) > MAX_NAMED else ""
        raise PicturesError(
            f"{len(lacking)} of {len(paths)} pictures in {folder} have no caption ({names}{more}): "
            f"write a {METADATA} with file_name and text a line, or a .txt of the same name beside each picture"
        )
    for path in paths:
        yield Picture(path, _read_text(path.with_suffix(".txt")).strip())


def _read_text(path: Path) -> str:
    """Without the mark that some editors put before it. Raises PicturesError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PicturesError(f"{path} isn't text in UTF-8: {error.reason} at byte {error.start}") from error


def prepare(path: Path, size: Size) -> Prepared:
    """Resized to cover `size` and cropped in the middle. Raises PicturesError."""
    width, height = size
    try:
        with Image.open(path) as image:
            picture = _on_white(ImageOps.exif_transpose(image))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise PicturesError(f"{path} can't be read as a picture: {error}") from error
    scale = max(width / picture.width, height / picture.height)
    covering = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    left, top = ((side - wanted) // 2 for side, wanted in zip(covering, size, strict=True))
    cropped = picture.resize(covering, Image.Resampling.LANCZOS).crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.asarray(cropped).copy()).permute(2, 0, 1).float() / 127.5 - 1
    return Prepared(pixels, torch.tensor([picture.height, picture.width, top, left, height, width]))


def _on_white(image: Image.Image) -> Image.Image:
    """In RGB, where transparent parts would be of any colour."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    opaque = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque).convert("RGB")


class PictureCache:
    """Encoded pictures on disk, read row by row. Meets Batches: draws a fresh latent from each picture's distribution,
    and leaves a share `dropout` of the captions out."""

    def __init__(self, folder: Path, batch_size: int, dropout: float = CAPTION_DROPOUT) -> None:
        self.folder, self.batch_size, self.dropout = folder, batch_size, dropout
        paths = sorted(folder.glob("shard-*.safetensors"))
        self._shards: list[Any] = [safe_open(path, framework="pt") for path in paths]
        self._ends: list[int] = list(accumulate(shard.get_slice("mean").get_shape()[0] for shard in self._shards))
        self._unconditional = _to_conditions(load_file(folder / "unconditional.safetensors"))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def identity(self) -> Identity:
        return {"data": self.folder.name, "batch_size": self.batch_size, "caption_dropout": self.dropout}

    @property
    def unconditional(self) -> Conditions:
        return self._unconditional

    def draw(self, rng: random.Random) -> Batch:
        """Different pictures, as far as there are enough."""
        everything = range(len(self))
        is_enough = len(everything) >= self.batch_size
        picks = rng.sample(everything, self.batch_size) if is_enough else rng.choices(everything, k=self.batch_size)
        rows = [self._row(pick) for pick in picks]
        mean, std = (torch.stack([row[name] for row in rows]).float() for name in ("mean", "std"))
        conditions = [self._conditions(row, is_dropped=rng.random() < self.dropout) for row in rows]
        return Batch(mean + std * torch.randn_like(mean), Conditions.stack(conditions))

    def _row(self, number: int) -> dict[str, Tensor]:
        shard = bisect_right(self._ends, number)
        file, row = self._shards[shard], number - (self._ends[shard - 1] if shard else 0)
        return {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118 - no dict

    def _conditions(self, row: Mapping[str, Tensor], *, is_dropped: bool) -> Conditions:
        own = _to_conditions({name: tensor[None] for name, tensor in row.items()})
        return self._unconditional.spread_over(own) if is_dropped else own


def encode_pictures(pictures: Sequence[Picture], encoders: Encoders, size: Size, root: Path) -> Path:
    """The folder in `root` with these pictures encoded: an earlier run's, if teacher, size and files are the same. A
    run that was broken off goes on where it ended. Raises PicturesError."""
    folder = root / cache_key(pictures, encoders, size)
    unfinished = folder.with_suffix(".part")
    if folder.exists():
        return folder
    unfinished.mkdir(parents=True, exist_ok=True)
    _save(_tensors_of(encoders.encode_captions([None])), unfinished, "unconditional")
    with tqdm(total=len(pictures), desc="encoding pictures", mininterval=2.0) as bar:
        for start in range(0, len(pictures), SHARD_PICTURES):
            shard = pictures[start : start + SHARD_PICTURES]
            name = f"shard-{start // SHARD_PICTURES:05}"
            if not (unfinished / f"{name}.safetensors").exists():
                _save(_encode(shard, encoders, size), unfinished, name)
            bar.update(len(shard))
    unfinished.replace(folder)
    return folder


def cache_key(pictures: Sequence[Picture], encoders: Encoders, size: Size) -> str:
    """The cache's name: of the teacher's encoders, the size, and each picture's file and caption."""
    teacher = encoders.teacher
    files = file_fingerprints(picture.path for picture in pictures)
    captions = [picture.caption for picture in pictures]
    return fingerprint(VERSION, teacher.fingerprint_of("vae", *teacher.text_encoders), size, files, captions)


def _encode(pictures: Sequence[Picture], encoders: Encoders, size: Size) -> dict[str, Tensor]:
    """One by one, since a VAE takes gigabytes for each large picture."""
    rows = [_encode_one(picture, encoders, size) for picture in pictures]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _encode_one(picture: Picture, encoders: Encoders, size: Size) -> dict[str, Tensor]:
    prepared = prepare(picture.path, size)
    mean, std = encoders.encode_pictures(prepared.pixels[None])
    conditions = encoders.encode_captions([picture.caption])
    if encoders.teacher.layout == "sdxl":
        conditions = conditions.with_time_ids(prepared.time_ids[None])
    return {"mean": mean, "std": std} | _tensors_of(conditions)


def _tensors_of(conditions: Conditions) -> dict[str, Tensor]:
    named = {"states": conditions.states, "pooled": conditions.pooled, "time_ids": conditions.time_ids}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _to_conditions(tensors: Mapping[str, Tensor]) -> Conditions:
    pooled = tensors.get("pooled")
    return Conditions(tensors["states"].float(), None if pooled is None else pooled.float(), tensors.get("time_ids"))


def _save(tensors: Mapping[str, Tensor], folder: Path, name: str) -> None:
    """In fp16, as whole files only."""
    halved = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    unfinished = folder / f".{name}"
    save_file({key: tensor.cpu().contiguous() for key, tensor in halved.items()}, unfinished)
    unfinished.replace(folder / f"{name}.safetensors")
