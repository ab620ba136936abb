"""Networks and pipelines as folders that any user of diffusers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def copy_unet(unet: Any, dtype: torch.dtype) -> Any:
    """On the CPU."""
    weights = {name: weight.to("cpu", dtype).contiguous() for name, weight in unet.state_dict().items()}
    with torch.device("meta"):
        copy = type(unet).from_config(unet.config)
    copy.load_state_dict(weights, assign=True)
    return copy


def save_pipeline(pipe: Any, folder: Path, variant: str | None = None) -> None:
    """Write a whole pipeline. The text encoders' configs say float32 whatever is in their files, so that no load mixes
    types; the tokenizers come in the older form too, which transformers 4 reads."""
    pipe.save_pretrained(folder, variant=variant)
    for name, part in pipe.components.items():
        if part is not None and name.startswith("text_encoder"):
            part.config.dtype = torch.float32
            part.config.save_pretrained(folder / name)
        if part is not None and name.startswith("tokenizer"):
            part.backend_tokenizer.model.save(str(folder / name))
