"""The `fewstep` command. Each subcommand imports its own side, so the gateway never loads torch."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from commands.console import configure_logging, console, fail, hush_libraries, say
from commands.distill import distill_app
from commands.keys import keys_app
from commands.models import models_app
from commands.train import train_app
from supervisor import EX_CONFIG, Child, ChildFailed, Supervisor, Terminal, die_with_parent

if TYPE_CHECKING:
    from app.settings import GatewaySettings
    from broker.embedded import EmbeddedRedis, GivenRedis
    from workers.settings import WorkerSettings
    from workers.warm_set import Report

logger = logging.getLogger("fewstep")

app = typer.Typer(
    help="Real-time text-to-image with few-step diffusion models. Start with: fewstep serve",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(models_app, name="models")
app.add_typer(keys_app, name="keys")
app.add_typer(distill_app, name="distill")
app.add_typer(train_app, name="train")

COMPUTING = ("worker", "train", "distill")  # commands that compute for long

ModelOption = Annotated[str, typer.Option("--model", "-m", help="An entry of the catalog; see: fewstep models list")]


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="The default model; else FEWSTEP_DEFAULT_MODEL, the first of FEWSTEP_MODELS, or mini-lcm.",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the embedded Redis; a temporary one if none.")
    ] = None,
) -> None:
    """Everything in one: Redis, gateway, one worker and the web page.

    The worker keeps the default model and those of FEWSTEP_MODELS warm, the default one first; the service is ready
    with the first that is warm. Uses the Redis of FEWSTEP_REDIS_URL, or starts one of its own. Ctrl-C ends all of it.

    Example: fewstep serve --port 9000
    """
    from app.settings import GatewaySettings, check_exposure, open_loopback
    from broker.embedded import resolve
    from broker.errors import BrokerError
    from broker.settings import SettingsError
    from models.catalog import CatalogError, get_spec, load_catalog

    configure_logging()
    try:
        models = _choose_models(model)
        settings = open_loopback(GatewaySettings.load(host=host, port=port, default_model=models[0]))
        check_exposure(settings)
        catalog = load_catalog(settings.catalog, settings.extra_catalog)
        for name in models:
            get_spec(catalog, name)
        _check_port(host, port)
        with resolve(data_dir=data_dir) as redis:
            asyncio.run(_check_redis(redis.url))
            _supervise(settings, models, redis)
    except (SettingsError, BrokerError, CatalogError, OSError) as error:
        fail(str(error))
    except ChildFailed as error:
        raise typer.Exit(EX_CONFIG) from error


def _choose_models(model: str | None) -> list[str]:
    """What the worker of `serve` keeps warm, the default model first."""
    from app.settings import GatewaySettings
    from workers.settings import WorkerSettings

    worker, gateway = WorkerSettings.load(), GatewaySettings.load()
    given = worker.model_names if "models" in worker.model_fields_set else []
    if model is None:
        is_given = "default_model" in gateway.model_fields_set or not given
        model = gateway.default_model if is_given else given[0]
    return list(dict.fromkeys([model, *given]))


async def _check_redis(url: str) -> None:
    from broker.redis_broker import RedisBroker

    async with RedisBroker(url):
        pass


def _supervise(settings: GatewaySettings, models: list[str], redis: GivenRedis | EmbeddedRedis) -> None:
    host, port = settings.host, settings.port
    environment = {"FEWSTEP_REDIS_URL": redis.url}
    gateway = {
        "FEWSTEP_HOST": host,
        "FEWSTEP_PORT": str(port),
        "FEWSTEP_DEFAULT_MODEL": settings.default_model,
        "FEWSTEP_ALLOW_ANONYMOUS": str(settings.allow_anonymous),
    }
    children = [
        Child("gateway", ["gateway"], environment | gateway),
        Child("worker", ["worker"], environment | {"FEWSTEP_MODELS": ",".join(models)}, stop_timeout_s=25),
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

    configure_logging()
    try:
        run(GatewaySettings.load(), Terminal().has_hung_up)
    except (SettingsError, BrokerError, CatalogError, OSError) as error:
        fail(str(error))
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
    from workers.warm_set import NothingForNow, NothingToServe
    from workers.worker import EngineLost

    configure_logging()
    try:
        asyncio.run(_run_worker(WorkerSettings.load()))
    except (BrokerError, NothingForNow) as error:
        fail(str(error), status=1)
    except (SettingsError, NothingToServe, CatalogError) as error:
        fail(str(error))
    except EngineLost as error:
        say(f"fewstep: {error}", "bold red")
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
        float | None, typer.Option("--guidance", help="Guidance scale, within the model's limits.")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What to avoid, for models with classifier-free guidance, at a scale above 1.")
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help="One of the model's schedulers.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:WEIGHT]", help="One of the model's style LoRAs; may be given several times."),
    ] = None,
    decoder: Annotated[str | None, typer.Option(help="full, tiny or auto; full if none.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels, one of the model's sizes.")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels, one of the model's sizes.")] = None,
) -> None:
    """One picture, without a server.

    Example: fewstep generate "a red apple on a blue background" -o apple.png
    """
    hush_libraries()  # before anything of them is imported that prints
    from commands.drawing import draw

    fields = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "scheduler": scheduler,
        "decoder": decoder,
        "width": width,
        "height": height,
    }
    draw(fields, lora or [], model, output)


@contextmanager
def _load_progress(settings: WorkerSettings) -> Iterator[Report]:
    """A bar on a terminal, log lines elsewhere."""
    hush_libraries()
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


def main() -> None:
    if sys.argv[1:] and sys.argv[1] in COMPUTING:
        from workers.allocator import use_tcmalloc

        use_tcmalloc()
    die_with_parent()
    app()


if __name__ == "__main__":
    main()
