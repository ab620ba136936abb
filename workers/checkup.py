"""One picture for each rule of a model, drawn as a worker draws it: does everything that its entry allows work?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from broker.messages import Delivery, Job, LoraWeight, SamplingParams
from models.catalog import ModelSpec
from workers.engine.calibration import WarmUpError, check_picture
from workers.engine.engine import Engine, run_until_done
from workers.engine.jobs import default_params
from workers.engine.outputs import Blocked, Finished, GenerationFailed
from workers.engine.request import RequestState

PROMPT = "a red apple on a blue background"
CLASS = "class 0"
NEGATIVE_PROMPT = "a dog"


@dataclass(frozen=True, slots=True)
class Trial:
    """One request, and what of the entry's rules it tries."""

    rule: str
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Outcome:
    """Times in milliseconds; `problem` says in one line why the picture isn't sound, or None."""

    trial: Trial
    text_ms: float
    steps_ms: list[float]
    decode_ms: float
    problem: str | None


def trials_of(spec: ModelSpec) -> Iterator[Trial]:
    """The entry's defaults, guidance where it is allowed, then each other scheduler, size and style LoRA once."""
    default = default_params(spec, _prompt_for(spec))
    yield Trial("class" if spec.family == "consistency" else "default", default)
    guided = replace(default, guidance_scale=spec.guidance_scale.max)
    if spec.is_guided(guided.guidance_scale):
        guided = replace(guided, negative_prompt=NEGATIVE_PROMPT)
    if guided != default and spec.guidance != "none":
        yield Trial(f"guidance {guided.guidance_scale:g}", guided)
    for scheduler in spec.schedulers:
        if scheduler != spec.default_scheduler:
            yield Trial(f"scheduler {scheduler}", replace(default, scheduler=scheduler))
    for width, height in spec.sizes[1:]:
        yield Trial(f"size {width}x{height}", replace(default, width=width, height=height))
    for name, lora in spec.loras.items():
        yield Trial(f"LoRA {name}", replace(default, loras=(LoraWeight(name, lora.weight.default),)))


def warm_up(engine: Engine, spec: ModelSpec) -> None:
    """A picture that isn't counted: it pays for what the first one has to prepare."""
    run_trial(engine, spec, Trial("warm-up", default_params(spec, _prompt_for(spec))))
    engine.runners[spec.name].forget_prompts()


def _prompt_for(spec: ModelSpec) -> str:
    return [*spec.example_prompts, CLASS if spec.family == "consistency" else PROMPT][0]


def run_trial(engine: Engine, spec: ModelSpec, trial: Trial) -> Outcome:
    job = Job("check", spec.name, trial.params, lane="api", owner="", gateway_id=None, keep_s=0)
    engine.add(Delivery(job, attempt=1, waited_ms=0))
    match run_until_done(engine):
        case [(Finished() | Blocked()) as output]:
            return _outcome(trial, output.request, _find_problem(engine, spec, output))
        case [GenerationFailed(request=request, error=error)]:
            lines = str(error).strip().splitlines() or [""]
            return _outcome(trial, request, f"{type(error).__name__}: {lines[0]}")
        case outputs:
            raise AssertionError(f"one request gave {outputs}")


def _find_problem(engine: Engine, spec: ModelSpec, output: Finished | Blocked) -> str | None:
    try:
        check_picture(engine.runners[spec.name].pipeline, output)
    except WarmUpError as error:
        return str(error).removeprefix(f"{spec.name}: ")
    return None


def _outcome(trial: Trial, request: RequestState, problem: str | None) -> Outcome:
    return Outcome(trial, request.text_ms, request.steps_ms, request.decode_ms, problem)
