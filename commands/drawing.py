"""fewstep generate: one picture, without a server and without a queue."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.errors import GatewayError
from app.parameters import Defaults, complete, find_warnings
from app.schemas import GenerationFields
from broker.messages import Delivery, Job
from commands.console import console, fail, one_line_errors, say
from models.catalog import ModelSpec, get_spec, load_catalog
from models.loading import LoadError
from workers.engine import Blocked, Finished, GenerationFailed
from workers.engine.engine import run_until_done
from workers.images import encode_picture
from workers.publisher import collect_warnings, explain_block
from workers.settings import WorkerSettings
from workers.standalone import load_engine

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def draw(fields: Mapping[str, Any], loras: Sequence[str], model: str, output: Path) -> None:
    """`fields` of a generation as the API has them, `loras` as NAME or NAME:WEIGHT."""
    output_format = FORMATS.get(output.suffix.lower())
    if output_format is None:
        fail(f"--output {output}: the name must end in {', '.join(FORMATS)}")
    asked = {**fields, "loras": [_read_lora(text) for text in loras], "output_format": output_format}
    with _told():
        settings = WorkerSettings.load(models=model)
        spec = get_spec(load_catalog(settings.catalog, settings.extra_catalog), model)
        _draw(_make_job(asked, spec), spec, settings, output)


@contextmanager
def _told() -> Iterator[None]:
    """Whatever is wrong with a request is one line."""
    try:
        with one_line_errors():
            yield
    except (GatewayError, LoadError) as error:
        fail(str(error))


def _read_lora(text: str) -> dict[str, str | float | None]:
    name, has_weight, weight = text.partition(":")
    try:
        return {"name": name, "weight": float(weight) if has_weight else None}
    except ValueError:
        fail(f"--lora {text}: NAME or NAME:WEIGHT is needed, the weight a number; got {weight!r}")


def _make_job(fields: Mapping[str, Any], spec: ModelSpec) -> Job:
    params = complete(GenerationFields.model_validate(fields), spec, Defaults(output_format="png"))
    warnings = find_warnings(params, spec)
    return Job("cli", spec.name, params, "api", "cli", gateway_id=None, keep_s=0, warnings=warnings)


def _draw(job: Job, spec: ModelSpec, settings: WorkerSettings, output: Path) -> None:
    with console.status(f"loading {spec.name}"):
        engine = load_engine(spec, settings)
    engine.add(Delivery(job, attempt=1, waited_ms=0))
    match run_until_done(engine):
        case [Finished(request=request, pixels=pixels)]:
            output.write_bytes(encode_picture(job, 0, pixels[0]).data)
            for warning in collect_warnings(request):
                say(f"warning: {warning}", "yellow")
            steps_ms = ", ".join(f"{ms:.0f}" for ms in request.steps_ms)
            console.print(f"{output}: seed {job.params.seed}, steps {steps_ms} ms, decode {request.decode_ms:.0f} ms")
        case [Blocked() as blocked]:
            fail(explain_block(blocked))
        case [GenerationFailed(error=reason)]:
            fail(f"{type(reason).__name__}: {reason}")
        case outputs:
            raise AssertionError(f"one request gave {outputs}")
