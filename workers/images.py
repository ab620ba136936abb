"""Pixels to image files, with the parameters that made them."""

from __future__ import annotations

import io
import json
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base
from PIL.PngImagePlugin import PngInfo

from broker.messages import Job, Picture

PNG_COMPRESS_LEVEL = 1  # level 6 takes twice as long for 1 % fewer bytes of a photo
WEBP_METHOD = 0
MAX_EXIF_CHARS = 60_000


def encode_picture(job: Job, index: int, pixels: NDArray[np.uint8]) -> Picture:
    """One picture "height width 3" in the job's format. Parameters travel as PNG text, or as EXIF description."""
    params = job.params
    height, width, _ = pixels.shape
    text = describe(job, index) if params.metadata else None
    if text is not None and params.output_format != "png" and len(text) > MAX_EXIF_CHARS:
        text = None  # doesn't fit into a JPEG's one segment
    data = _encode(Image.fromarray(pixels), params.output_format, params.output_quality, text)
    return Picture(index, params.seed + index, params.output_format, width, height, data)


def describe(job: Job, index: int) -> str:
    """The parameters of image `index` as JSON: enough to draw it again."""
    params = asdict(job.params) | {"seed": job.params.seed + index, "model": job.model}
    for key in ("num_images", "previews", "metadata", "output_quality", "output_format"):
        del params[key]
    return json.dumps(params)


def _encode(image: Image.Image, image_format: str, quality: int, text: str | None) -> bytes:
    buffer = io.BytesIO()
    match image_format:
        case "png":
            info = PngInfo()
            if text is not None:
                info.add_itxt("parameters", text)
            image.save(buffer, "PNG", compress_level=PNG_COMPRESS_LEVEL, pnginfo=info)
        case "jpeg":
            image.save(buffer, "JPEG", quality=quality, exif=_exif(text))
        case "webp":
            image.save(buffer, "WEBP", quality=quality, method=WEBP_METHOD, exif=_exif(text))
    return buffer.getvalue()


def _exif(text: str | None) -> Image.Exif:
    exif = Image.Exif()
    if text is not None:
        exif[Base.ImageDescription] = text
    return exif
