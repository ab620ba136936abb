"""A folder of pictures becomes latents and embeddings once, and batches of them ever after."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models.training.errors import PicturesError
from models.training.pictures import SHARD_PICTURES, PictureCache, encode_pictures, find_pictures, prepare
from models.training.teachers import Conditions, Encoders, Teacher
from tests.training_data import CAPTIONS, CPU, SIZE, Kind, make_batches, make_teacher, write_pictures


@pytest.fixture(scope="module")
def teacher(root: Path) -> Teacher:
    return make_teacher(root, "sdxl")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures")


class CountingEncoders(Encoders):
    """That know how often they were asked."""

    num_pictures = 0

    def encode_pictures(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.num_pictures += len(pixels)
        return super().encode_pictures(pixels)


def test_pictures_and_captions_of_a_list(folder: Path) -> None:
    pictures = find_pictures(folder)
    assert [picture.caption for picture in pictures] == list(CAPTIONS)
    assert [picture.path.name for picture in pictures] == [f"{number}.png" for number in range(6)]


def test_captions_beside_pictures_in_folders_too(folder: Path) -> None:
    (folder / "metadata.jsonl").unlink()
    (folder / "more").mkdir()
    shutil.move(folder / "0.png", folder / "more" / "0.PNG")
    for path in [*folder.glob("*.png"), folder / "more" / "0.PNG"]:
        path.with_suffix(".txt").write_text(f"caption of {path.stem}\n")
    captions = [picture.caption for picture in find_pictures(folder)]
    assert captions == [f"caption of {number}" for number in (1, 2, 3, 4, 5, 0)]


def test_a_picture_is_covered_cropped_and_measured(tmp_path: Path) -> None:
    """White in the middle, black at both ends, which are cropped away."""
    pixels = np.zeros((50, 200, 3), np.uint8)
    pixels[:, 70:130] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    prepared = prepare(tmp_path / "wide.png", (48, 100))
    assert prepared.pixels.shape == (3, 100, 48)
    assert float(prepared.pixels.min()) > 0.99
    # original height and width, top and left of the crop in the resized picture of 400 x 100, target height and width
    assert prepared.time_ids.tolist() == [50, 200, 0, 176, 100, 48]


def test_rotation_marks_are_followed_and_transparent_is_white(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (60, 40), "red").save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert prepare(tmp_path / "turned.jpg", (32, 32)).time_ids.tolist()[:2] == [60, 40]
    assert float(prepare(tmp_path / "clear.png", (32, 32)).pixels.min()) > 0.99


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_batch_is_what_the_encoders_say(tmp_path: Path, kind: Kind) -> None:
    teacher = make_teacher(tmp_path, kind)
    batches = make_batches(tmp_path, teacher, batch_size=6, dropout=0.0)
    encoders = teacher.load_encoders(CPU)
    batch = batches.draw(random.Random(0))
    order = random.Random(0).sample(range(6), 6)
    texts = encoders.encode_captions([CAPTIONS[number] for number in order])
    prepared = [prepare(tmp_path / "pictures" / f"{number}.png", SIZE) for number in order]
    mean, std = encoders.encode_pictures(torch.stack([picture.pixels for picture in prepared]))
    assert torch.allclose(batch.conditions.states, texts.states, atol=1e-2)
    assert bool(((batch.latents - mean).abs() < 6 * std + 1e-2).all())
    if kind == "sd":
        assert batch.conditions.time_ids is None
    else:
        assert batch.conditions.time_ids is not None
        assert batch.conditions.time_ids.tolist() == [picture.time_ids.tolist() for picture in prepared]


def test_latents_are_drawn_anew_each_time(root: Path, teacher: Teacher) -> None:
    batches = make_batches(root, teacher)
    first, second = (batches.draw(random.Random(0)) for _ in range(2))
    assert not torch.equal(first.latents, second.latents)
    assert torch.equal(first.conditions.states, second.conditions.states)


@pytest.mark.parametrize(("dropout", "share"), [(0.0, 0.0), (1.0, 1.0), (0.5, 0.5)])
def test_a_share_of_the_captions_is_left_out(root: Path, teacher: Teacher, dropout: float, share: float) -> None:
    batches, rng = make_batches(root, teacher, dropout=dropout), random.Random(0)
    drawn = Conditions.stack([batches.draw(rng).conditions for _ in range(50)])
    is_empty = (drawn.states == batches.unconditional.states).all(dim=(1, 2)).float().mean()
    assert float(is_empty) == pytest.approx(share, abs=0.15 if 0 < share < 1 else 0)


def test_more_rows_than_pictures(root: Path, teacher: Teacher) -> None:
    assert len(make_batches(root, teacher, batch_size=9).draw(random.Random(0)).latents) == 9


def encode(folder: Path, teacher: Teacher, cache: Path, size: tuple[int, int] = SIZE) -> tuple[Path, int]:
    """The cache's folder, and how many pictures had to be encoded."""
    encoders = CountingEncoders(teacher, CPU)
    return encode_pictures(find_pictures(folder), encoders, size, cache), encoders.num_pictures


def test_a_second_run_encodes_nothing(folder: Path, teacher: Teacher, tmp_path: Path) -> None:
    first = encode(folder, teacher, tmp_path / "cache")
    moved = folder.rename(tmp_path / "moved")
    assert first[1] == 6
    assert encode(moved, teacher, tmp_path / "cache") == (first[0], 0)


def rename_caption(folder: Path) -> None:
    path = folder / "metadata.jsonl"
    path.write_text(path.read_text().replace("a red apple", "a green apple"))


def repaint(folder: Path) -> None:
    path = folder / "3.png"
    status = path.stat()
    with Image.open(path) as image:
        Image.eval(image, lambda value: 255 - value).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def add_picture(folder: Path) -> None:
    shutil.copyfile(folder / "3.png", folder / "6.png")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "6.png", "text": "once more"}')


@pytest.mark.parametrize(("change", "count"), [(rename_caption, 6), (repaint, 6), (add_picture, 7)])
def test_other_files_are_encoded_anew(
    folder: Path, teacher: Teacher, tmp_path: Path, change: object, count: int
) -> None:
    first, _ = encode(folder, teacher, tmp_path / "cache")
    assert callable(change)
    change(folder)
    second, encoded = encode(folder, teacher, tmp_path / "cache")
    assert (second != first, encoded) == (True, count)


def test_another_size_or_teacher_is_encoded_anew(folder: Path, teacher: Teacher, tmp_path: Path) -> None:
    other = make_teacher(tmp_path, "sd")
    places = [encode(folder, *run) for run in ((teacher, tmp_path), (teacher, tmp_path, (48, 32)), (other, tmp_path))]
    assert len({place for place, _ in places}) == 3
    assert [count for _, count in places] == [6, 6, 6]


def test_an_encoding_that_was_broken_off_goes_on(folder: Path, teacher: Teacher, tmp_path: Path) -> None:
    pictures = find_pictures(folder)
    many = [pictures[number % 6] for number in range(SHARD_PICTURES + 3)]

    class Broken(CountingEncoders):
        def encode_pictures(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            if self.num_pictures == SHARD_PICTURES:
                raise KeyboardInterrupt
            return super().encode_pictures(pixels)

    with pytest.raises(KeyboardInterrupt):
        encode_pictures(many, Broken(teacher, CPU), SIZE, tmp_path / "cache")
    encoders = CountingEncoders(teacher, CPU)
    cache = PictureCache(encode_pictures(many, encoders, SIZE, tmp_path / "cache"), 4)
    assert (encoders.num_pictures, len(cache)) == (3, SHARD_PICTURES + 3)


def assert_refused(folder: Path, *reasons: str) -> None:
    with pytest.raises(PicturesError) as caught:
        find_pictures(folder)
    for reason in reasons:
        assert reason in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", f"there is no folder {tmp_path / 'nowhere'}")


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    assert_refused(tmp_path, f"{tmp_path} has no pictures: .jpg, .jpeg, .png, .webp, .bmp are read")


def test_pictures_without_captions_are_named(folder: Path) -> None:
    (folder / "metadata.jsonl").unlink()
    (folder / "0.txt").write_text("one")
    assert_refused(folder, "5 of 6 pictures", "(1.png, 2.png, 3.png, …)", "metadata.jsonl", ".txt")


@pytest.mark.parametrize("line", ["{", "[]", '{"file_name": "0.png"}', '{"text": "a"}'])
def test_a_wrong_line_is_named(folder: Path, line: str) -> None:
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(f"\n{line}")
    assert_refused(folder, f"{folder / 'metadata.jsonl'}, line 7: an object with file_name and text is needed")


def test_a_listed_picture_that_is_not_there_is_named(folder: Path) -> None:
    (folder / "2.png").unlink()
    assert_refused(folder, "line 3: there is no file", "2.png")


@pytest.mark.parametrize("content", [b"", b"no picture", json.dumps({}).encode()])
def test_a_file_that_is_no_picture_is_named(tmp_path: Path, content: Sequence[int]) -> None:
    (tmp_path / "0.png").write_bytes(bytes(content))
    with pytest.raises(PicturesError, match=r"0\.png can't be read as a picture"):
        prepare(tmp_path / "0.png", SIZE)


def test_a_picture_that_breaks_off_is_named(folder: Path) -> None:
    path = folder / "0.png"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(PicturesError, match=r"0\.png can't be read as a picture"):
        prepare(path, SIZE)


@pytest.mark.parametrize("name", ["metadata.jsonl", "3.txt"])
def test_a_caption_in_another_encoding_is_named(folder: Path, name: str) -> None:
    if name == "3.txt":
        (folder / "metadata.jsonl").unlink()
        for path in folder.glob("*.png"):
            path.with_suffix(".txt").write_text("one")
    (folder / name).write_bytes("ein Käfer".encode("latin-1"))
    assert_refused(folder, f"{folder / name} isn't text in UTF-8")


def test_a_byte_order_mark_is_no_part_of_a_caption(folder: Path) -> None:
    (folder / "metadata.jsonl").unlink()
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text("one", encoding="utf-8-sig")
    assert {picture.caption for picture in find_pictures(folder)} == {"one"}
