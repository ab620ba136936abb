"""The `fewstep` command. Each subcommand imports its own side, so the gateway never loads torch."""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from supervisor import EX_CONFIG, Child, ChildFailed, Supervisor, Terminal, die_with_parent

if TYPE_CHECKING:
    from app.access.keys import KeyRecord
    from app.settings import GatewaySettings
    from broker.embedded import EmbeddedRedis, GivenRedis
    from broker.messages import Job
    from models.catalog import ModelSpec
    from workers.settings import WorkerSettings
    from workers.warm_set import Report

logger = logging.getLogger("fewstep")
console = Console(stderr=True)

app = typer.Typer(
    help="Real-time text-to-image with few-step diffusion models. Start with: fewstep serve",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="What can be served.", no_args_is_help=True)
app.add_typer(models_app, name="models")
keys_app = typer.Typer(help="Who may use a gateway: API keys in a file of hashes.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")

ModelOption = Annotated[str, typer.Option("--model", "-m", help="An entry of the catalog; see: fewstep models list")]

KeysFile = Annotated[Path, typer.Option("--file", "-f", envvar="FEWSTEP_API_KEYS_FILE", help="The file of the keys.")]


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    model: ModelOption = "mini-lcm",
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the embedded Redis; a temporary one if none.")
    ] = None,
) -> None:
    """Everything in one: Redis, gateway, one worker and the web page.

    Uses the Redis of FEWSTEP_REDIS_URL, or starts one of its own. Ctrl-C ends all of it.

    Example: fewstep serve --port 9000
    """
    from app.settings import GatewaySettings, check_exposure, open_loopback
    from broker.embedded import resolve
    from broker.errors import BrokerError
    from broker.settings import SettingsError
    from models.catalog import CatalogError, get_spec, load_catalog

    _configure_logging()
    try:
        settings = open_loopback(GatewaySettings.load(host=host, port=port, default_model=model))
        check_exposure(settings)
        get_spec(load_catalog(settings.catalog, settings.extra_catalog), model)
        _check_port(host, port)
        with resolve(data_dir=data_dir) as redis:
            asyncio.run(_check_redis(redis.url))
            _supervise(settings, redis)
    except (SettingsError, BrokerError, CatalogError, OSError) as error:
        _fail(str(error))
    except ChildFailed as error:
        raise typer.Exit(EX_CONFIG) from error


async def _check_redis(url: str) -> None:
    from broker.redis_broker import RedisBroker

    async with RedisBroker(url):
        pass


def _supervise(settings: GatewaySettings, redis: GivenRedis | EmbeddedRedis) -> None:
    host, port, model = settings.host, settings.port, settings.default_model
    environment = {"FEWSTEP_REDIS_URL": redis.url}
    gateway = {
        "FEWSTEP_HOST": host,
        "FEWSTEP_PORT": str(port),
        "FEWSTEP_DEFAULT_MODEL": model,
        "FEWSTEP_ALLOW_ANONYMOUS": str(settings.allow_anonymous),
    }
    children = [
        Child("gateway", ["gateway"], environment | gateway),
        Child("worker", ["worker"], environment | {"FEWSTEP_MODELS": model}, stop_timeout_s=25),
    ]
    url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else _bracketed(host)}:{port}"

    def tend() -> None:
        if redis.revive():
            logger.error("Redis had died; it is back, with what it had written")

    def announce() -> None:
        console.print(f"[bold green]fewstep is ready:[/] open [link={url}]{url}[/link]   (Ctrl-C ends it)")

    Supervisor(children, tend).run(lambda: _answers_ready(url), announce)
    console.print("fewstep has ended")


@app.command()
def gateway() -> None:
    """The HTTP side alone. Settings are FEWSTEP_* variables: FEWSTEP_REDIS_URL, FEWSTEP_HOST, FEWSTEP_PORT, …

    Who may use it has to be said: FEWSTEP_API_KEYS_FILE (see fewstep keys create), or FEWSTEP_ALLOW_ANONYMOUS=1.

    Example: FEWSTEP_REDIS_URL=redis://10.0.0.5:6379 FEWSTEP_API_KEYS_FILE=keys.toml fewstep gateway
    """
    from app.main import run
    from app.settings import GatewaySettings
    from broker.errors import BrokerError
    from broker.settings import SettingsError
    from models.catalog import CatalogError

    _configure_logging()
    try:
        run(GatewaySettings.load(), Terminal().has_hung_up)
    except (SettingsError, BrokerError, CatalogError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def worker() -> None:
    """One worker: keeps the models of FEWSTEP_MODELS warm and takes work from the Redis of FEWSTEP_REDIS_URL.

    Start as many as there are GPUs, on as many machines as you like.

    Example: FEWSTEP_MODELS=mini-lcm FEWSTEP_DEVICE=cuda:1 fewstep worker
    """
    from broker.errors import BrokerError
    from broker.settings import SettingsError
    from models.catalog import CatalogError
    from workers.settings import WorkerSettings
    from workers.warm_set import NothingToServe
    from workers.worker import EngineLost

    _configure_logging()
    try:
        asyncio.run(_run_worker(WorkerSettings.load()))
    except (SettingsError, NothingToServe, CatalogError) as error:
        _fail(str(error))
    except BrokerError as error:
        _fail(str(error), status=1)
    except EngineLost as error:
        console.print(f"fewstep: {error}", style="bold red", highlight=False, markup=False, soft_wrap=True)
        os._exit(1)  # a normal end would wait for the engine's thread


async def _run_worker(settings: WorkerSettings) -> None:
    from workers.worker import Worker

    with _load_progress(settings) as report:
        worker = Worker(settings, report)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, worker.request_stop)
        terminal = Terminal()
        loop.add_signal_handler(
            signal.SIGHUP, lambda: worker.request_stop() if terminal.has_hung_up() else worker.reload()
        )
        await worker.serve()


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .png, .jpg or .webp.")] = Path(
        "out.png"
    ),
    model: ModelOption = "mini-lcm",
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the model's default if none.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same picture; random if none.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance", help="Above 1: classifier-free guidance.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid; needs guidance above 1.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="One of the model's schedulers.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels, one of the model's sizes.")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels, one of the model's sizes.")] = None,
) -> None:
    """One picture, without a server.

    Example: fewstep generate "a red apple on a blue background" -o apple.png
    """
    from pydantic import ValidationError

    from app.errors import GatewayError
    from app.parameters import Defaults, complete, find_warnings
    from app.schemas import GenerationFields
    from broker.messages import Job
    from broker.settings import SettingsError
    from models.catalog import CatalogError, get_spec, load_catalog
    from models.loading import LoadError
    from workers.settings import WorkerSettings

    formats = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
    if output.suffix.lower() not in formats:
        _fail(f"--output {output}: the name must end in {', '.join(formats)}")
    fields = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "scheduler": scheduler,
        "width": width,
        "height": height,
        "output_format": formats[output.suffix.lower()],
    }
    try:
        settings = WorkerSettings.load(models=model)
        spec = get_spec(load_catalog(settings.catalog, settings.extra_catalog), model)
        params = complete(GenerationFields.model_validate(fields), spec, Defaults(output_format="png"))
        warnings = find_warnings(params, spec)
        job = Job("cli", spec.name, params, "api", "cli", gateway_id=None, keep_s=0, warnings=warnings)
        _draw(job, spec, settings, output)
    except ValidationError as error:
        first = error.errors()[0]
        _fail(f"{first['loc'][0]}={first['input']!r}: {first['msg']}")
    except (SettingsError, CatalogError, GatewayError, LoadError, OSError) as error:
        _fail(str(error))


def _draw(job: Job, spec: ModelSpec, settings: WorkerSettings, output: Path) -> None:
    from broker.messages import Delivery
    from models.loading import load_pipeline
    from workers.engine import Blocked, Engine, Finished, GenerationFailed
    from workers.engine.engine import run_until_done
    from workers.engine.runner import ModelRunner
    from workers.images import encode_picture
    from workers.publisher import collect_warnings, explain_block
    from workers.worker import place

    _hush_libraries()
    with console.status(f"loading {spec.name}"):
        engine = Engine({spec.name: ModelRunner(load_pipeline(spec, *place(settings)))})
    engine.add(Delivery(job, attempt=1, waited_ms=0))
    match run_until_done(engine):
        case [Finished(request=request, pixels=pixels)]:
            output.write_bytes(encode_picture(job, 0, pixels[0]).data)
            for warning in collect_warnings(request):
                console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
            steps_ms = ", ".join(f"{ms:.0f}" for ms in request.steps_ms)
            console.print(f"{output}: seed {job.params.seed}, steps {steps_ms} ms, decode {request.decode_ms:.0f} ms")
        case [Blocked() as blocked]:
            _fail(explain_block(blocked))
        case [GenerationFailed(error=reason)]:
            _fail(f"{type(reason).__name__}: {reason}")
        case outputs:
            raise AssertionError(f"one request gave {outputs}")


@models_app.command("list")
def list_models() -> None:
    """The catalog: names, steps, sizes, licences."""
    from rich.table import Table

    from broker.settings import SettingsError
    from models.catalog import CatalogError, load_catalog
    from workers.settings import WorkerSettings

    table = Table("name", "steps", "sizes", "licence", "description", box=None, pad_edge=False)
    try:
        settings = WorkerSettings.load()
        catalog = load_catalog(settings.catalog, settings.extra_catalog)
    except (SettingsError, CatalogError) as error:
        _fail(str(error))
    for spec in catalog.values():
        steps = spec.num_inference_steps
        sizes = ", ".join(f"{width}x{height}" for width, height in spec.sizes)
        table.add_row(spec.name, f"{steps.default} ({steps.min}-{steps.max})", sizes, spec.license, spec.description)
    Console().print(table)


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What you will know it by.")],
    file: KeysFile,
    weight: Annotated[int | None, typer.Option(help="Its share beside other keys, 1 to 100; 1 if none.")] = None,
    requests: Annotated[int | None, typer.Option("--requests-per-minute", help="Unlimited if none.")] = None,
    images: Annotated[int | None, typer.Option("--images-per-minute", help="Unlimited if none.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model it may use, once for each; all if none.")] = None,
    lane: Annotated[list[str] | None, typer.Option(help="live or api; both if none.")] = None,
) -> None:
    """Makes a key and prints it, this once. The file gets only its hash; a running gateway reads it within a second.

    Example: fewstep keys create shop --file keys.toml --images-per-minute 120
    """
    from app.access.key_file import add_key, format_entry, make_key, new_record

    with _one_line_errors():
        key_id, key = make_key()
        record = new_record(
            key,
            name=name,
            weight=weight,
            max_requests_per_minute=requests,
            max_images_per_minute=images,
            models=_check_models(model or []),
            lanes=lane,
            created=datetime.date.today(),
        )
        add_key(file, record, key_id)
    print(key)
    console.print(f"{file}: has key {key_id}. It is shown only now: keep it.", markup=False, soft_wrap=True)
    console.print(f"For FEWSTEP_API_KEYS: {format_entry(key_id, record)}", markup=False, soft_wrap=True)


@keys_app.command("list")
def list_keys(file: KeysFile) -> None:
    """The keys of a file: ids, names, rates.

    Example: fewstep keys list --file keys.toml
    """
    from rich.table import Column, Table

    from app.access.keys import parse_file

    with _one_line_errors():
        records = parse_file(file)
    headings = ("name", "weight", "requests/min", "images/min", "models", "lanes", "created")
    table = Table(Column("id", no_wrap=True, min_width=12), *headings, box=None, pad_edge=False)
    for key_id, record in records.items():
        table.add_row(key_id, *_show_record(record))
    Console().print(table)


def _show_record(record: KeyRecord) -> Iterator[str]:
    yield from (record.name, str(record.weight))
    for rate in (record.max_requests_per_minute, record.max_images_per_minute):
        yield "unlimited" if rate is None else str(rate)
    yield ", ".join(sorted(record.models)) if record.models else "all"
    yield ", ".join(sorted(record.lanes))
    yield str(record.created or "")


@keys_app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="Its id: the part between fs_ and the next underscore.")], file: KeysFile
) -> None:
    """Takes a key out of the file; a running gateway refuses it within a second and ends its live sockets.

    Example: fewstep keys revoke 3f0a9c51b2de --file keys.toml
    """
    from app.access.key_file import remove_key

    with _one_line_errors():
        record = remove_key(file, key_id)
    console.print(f"{file}: key {key_id} {record.name} is revoked", markup=False, highlight=False, soft_wrap=True)


def _check_models(names: list[str]) -> list[str]:
    from app.settings import GatewaySettings
    from models.catalog import get_spec, load_catalog

    settings = GatewaySettings.load()
    catalog = load_catalog(settings.catalog, settings.extra_catalog)
    return [get_spec(catalog, name).name for name in names]


@contextmanager
def _one_line_errors() -> Iterator[None]:
    from pydantic import ValidationError

    from broker.settings import SettingsError
    from models.catalog import CatalogError

    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        _fail(f"{'.'.join(str(part) for part in first['loc'])}={first['input']!r}: {first['msg']}")
    except (SettingsError, CatalogError, OSError) as error:
        _fail(str(error))


@contextmanager
def _load_progress(settings: WorkerSettings) -> Iterator[Report]:
    """A bar on a terminal, log lines elsewhere."""
    _hush_libraries()
    if not console.is_terminal:
        yield lambda model, detail: logger.info("%s: %s", model, detail)
        return
    from models.catalog import get_spec, load_catalog
    from workers.engine.calibration import num_warm_ups
    from workers.worker import place

    catalog, (device, _) = load_catalog(settings.catalog, settings.extra_catalog), place(settings)
    stages = {name: 2 + num_warm_ups(get_spec(catalog, name), device) for name in settings.model_names}
    done = dict.fromkeys(stages, 0)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=sum(stages.values()))

        def report(model: str, detail: str) -> None:
            is_over = detail in ("warm", "failed")
            done[model] = stages[model] if is_over else min(done[model] + 1, stages[model])
            progress.update(task, description=f"{model}: {detail}", completed=sum(done.values()))
            if progress.finished:
                progress.stop()

        yield report


def _hush_libraries() -> None:
    """Their progress bars and hints would drown ours; errors still show."""
    import diffusers
    import transformers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _configure_logging() -> None:
    level = os.environ.get("FEWSTEP_LOG_LEVEL", "info").upper()
    logging.basicConfig(
        level=level if level in logging.getLevelNamesMapping() else "INFO",
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _check_port(host: str, port: int) -> None:
    """Fails early with one line, before anything is started."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(f"can't listen on {host}:{port}: {error.strerror}; choose another with --port") from error


def _answers_ready(url: str) -> bool:
    import httpx

    try:
        return httpx.get(f"{url}/readyz", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _fail(message: str, status: int = EX_CONFIG) -> NoReturn:
    console.print(f"fewstep: {message}", style="bold red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(status)


def main() -> None:
    die_with_parent()
    app()


if __name__ == "__main__":
    main()
