"""The style LoRAs of a request: names, weights, and words that they want in the prompt."""

from __future__ import annotations

from collections.abc import Sequence

from app.errors import invalid
from app.schemas import LoraChoice
from broker.messages import LoraWeight, SamplingParams
from models.catalog import ModelSpec


def check_loras(choices: Sequence[LoraChoice], spec: ModelSpec) -> tuple[LoraWeight, ...]:
    """Each with a weight, sorted by name, so that the same wish is the same batch; those of weight 0 are left out.

    Raises InvalidRequest that names the field.
    """
    names = [choice.name for choice in choices]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise invalid(f"loras.{place}.name", name, "each LoRA can be given once")
    weights = [_check(place, choice, spec) for place, choice in enumerate(choices)]
    return tuple(sorted((lora for lora in weights if lora.weight), key=lambda lora: lora.name))


def lora_warnings(params: SamplingParams, spec: ModelSpec) -> tuple[str, ...]:
    """About LoRAs that were trained on words which the prompt lacks."""
    chosen = [spec.loras[lora.name] for lora in params.loras]
    return tuple(
        f"loras: {lora.name} works best with {lora.trigger!r} in the prompt"
        for lora in chosen
        if lora.trigger.casefold() not in params.prompt.casefold()
    )


def _check(place: int, choice: LoraChoice, spec: ModelSpec) -> LoraWeight:
    lora = spec.loras.get(choice.name)
    if lora is None:
        offered = f"{spec.name} has {', '.join(sorted(spec.loras)) or 'no style LoRAs'}"
        raise invalid(f"loras.{place}.name", choice.name, offered, code="lora_not_found")
    allowed = lora.weight
    weight = allowed.default if choice.weight is None else choice.weight
    if not allowed.min <= weight <= allowed.max:
        raise invalid(f"loras.{place}.weight", weight, f"{lora.name} allows {allowed.min:g} to {allowed.max:g}")
    return LoraWeight(lora.name, float(weight))
