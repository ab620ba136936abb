from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import Base

from tests.jobs import make_job
from workers.images import encode_picture

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_the_file_says_what_it_is_and_how_it_was_made(output_format: str) -> None:
    job = make_job(output_format=output_format, num_images=3, seed=5, prompt="ein Äpfel 🍎 \ud800")
    picture = encode_picture(job, 2, PIXELS)
    assert (picture.index, picture.seed, picture.width, picture.height) == (2, 7, 32, 24)
    with Image.open(io.BytesIO(picture.data)) as image:
        assert image.format == output_format.upper()
        text = image.info["parameters"] if output_format == "png" else image.getexif()[Base.ImageDescription]
    described = json.loads(text)
    assert described["prompt"] == job.params.prompt
    assert (described["seed"], described["model"], described["num_inference_steps"]) == (7, "small", 4)


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_metadata_can_be_left_out(output_format: str) -> None:
    data = encode_picture(make_job(output_format=output_format, metadata=False), 0, PIXELS).data
    with Image.open(io.BytesIO(data)) as image:
        assert "parameters" not in image.info
        assert not dict(image.getexif())


def test_png_keeps_every_pixel() -> None:
    with Image.open(io.BytesIO(encode_picture(make_job(), 0, PIXELS).data)) as image:
        assert np.array_equal(np.asarray(image), PIXELS)


def test_quality_matters() -> None:
    small, large = (
        encode_picture(make_job(output_format="jpeg", output_quality=quality), 0, PIXELS).data for quality in (20, 95)
    )
    assert len(small) < len(large)
