"""The catalog entry that serves what was distilled, as a table of TOML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.training.teachers import OTHER_KEYS, Size, Teacher

ENTRY_FILE = "catalog.toml"
USUAL_STEPS, MOST_STEPS = 4, 8
USUAL_GUIDANCE = 8.0  # the published full LCMs' default
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def base_entry(teacher: Teacher, size: Size, description: str, networks: Mapping[str, Any]) -> dict[str, Any]:
    """What every entry of this teacher's layout and size says, without schedulers, steps and guidance; `networks` are
    the keys that name them.

    Where the VAE overflows in half precision, the model is served in bfloat16.
    """
    overflows = teacher.layout == "sdxl" and teacher.vae_config.get("force_upcast", True)
    kept = {key: teacher.entry[key] for key in OTHER_KEYS if key in teacher.entry}
    return {
        "description": description,
        "family": teacher.layout,
        **networks,
        **({"dtype": "bfloat16"} if overflows else {}),
        "license": "as its teacher's",
        **kept,
        "sizes": [list(size)],
        "warm_sizes": [list(size)],
    }


def lcm_lora_entry(teacher: Teacher, size: Size, lora: Path, solver_timesteps: int) -> dict[str, Any]:
    """The teacher with its LCM-LoRA."""
    return {
        **base_entry(teacher, size, f"{teacher.name} with an LCM-LoRA", teacher.serving_keys),
        "guidance_scale": {"default": 0.0, "min": 0.0, "max": 2.0},
        "lora": {"source": str(lora.resolve())},
        **lcm_rules(solver_timesteps),
    }


def full_lcm_entry(
    teacher: Teacher, size: Size, folder: Path, solver_timesteps: int, guidance: tuple[float, float]
) -> dict[str, Any]:
    """A whole LCM, whose guidance scales are those that it was distilled with."""
    low, high = guidance
    return {
        **base_entry(teacher, size, f"an LCM distilled from {teacher.name}", {"source": str(folder.resolve())}),
        "guidance": "embedded",
        "guidance_scale": {"default": min(max(USUAL_GUIDANCE, low), high), "min": low, "max": high},
        **lcm_rules(solver_timesteps),
    }


def turbo_entry(teacher: Teacher, size: Size, folder: Path, num_steps: int) -> dict[str, Any]:
    """A whole Turbo model, of up to as many steps as it was distilled at."""
    description = f"a Turbo model distilled from {teacher.name}"
    networks = {"source": str(folder.resolve())}
    return {**base_entry(teacher, size, description, networks), **_turbo_rules(num_steps)}


def turbo_lora_entry(teacher: Teacher, size: Size, lora: Path, num_steps: int) -> dict[str, Any]:
    """The teacher with a Turbo LoRA."""
    description = f"{teacher.name} with a Turbo LoRA"
    base = base_entry(teacher, size, description, teacher.serving_keys)
    return {**base, "lora": {"source": str(lora.resolve())}, **_turbo_rules(num_steps)}


def _turbo_rules(num_steps: int) -> dict[str, Any]:
    """By default as many steps, up to 4, as start at timesteps that it was distilled at."""
    euler = {"class_name": "EulerAncestralDiscreteScheduler", "config": {"timestep_spacing": "trailing"}}
    return {
        "num_inference_steps": {"default": _most_that_divides(num_steps), "min": 1, "max": num_steps},
        "guidance": "none",
        "guidance_scale": {"default": 0.0, "min": 0.0, "max": 0.0},
        "default_scheduler": "euler-ancestral",
        "schedulers": {"euler-ancestral": euler},
    }


def _most_that_divides(num_steps: int) -> int:
    """Trailing timesteps of n steps are among those of num_steps where n divides it."""
    return max(steps for steps in range(1, USUAL_STEPS + 1) if num_steps % steps == 0)


def lcm_rules(solver_timesteps: int) -> dict[str, Any]:
    """An LCM's, whose steps are among those that it was distilled with."""
    steps = {"default": min(USUAL_STEPS, solver_timesteps), "min": 1, "max": min(MOST_STEPS, solver_timesteps)}
    lcm = {"class_name": "LCMScheduler", "config": {"original_inference_steps": solver_timesteps}}
    return {"num_inference_steps": steps, "default_scheduler": "lcm", "schedulers": {"lcm": lcm}}


def write_table(name: str, entry: Mapping[str, Any]) -> str:
    """`[name]` and its keys, nested tables inline."""
    key = name if BARE_KEY.fullmatch(name) else json.dumps(name)
    return "\n".join([f"[{key}]", *(f"{key} = {_to_toml(value)}" for key, value in entry.items())]) + "\n"


def save_table(name: str, entry: Mapping[str, Any], folder: Path) -> Path:
    """A catalog file of this one entry."""
    path = folder / ENTRY_FILE
    path.write_text(write_table(name, entry), encoding="utf-8")
    return path


def _to_toml(value: Any) -> str:
    match value:
        case Mapping():
            return "{ " + ", ".join(f"{key} = {_to_toml(item)}" for key, item in value.items()) + " }"
        case list():
            return "[" + ", ".join(_to_toml(item) for item in value) + "]"
        case _:
            return json.dumps(value, ensure_ascii=False)
