"""fewstep models check: load, draw, judge, print."""

from __future__ import annotations

from collections.abc import Iterator

import typer
from rich.table import Column, Table

from commands.console import console, hush_libraries, output, say
from models.catalog import ModelSpec
from models.loading import LoadError
from workers.checkup import Outcome, run_trial, trials_of, warm_up
from workers.settings import WorkerSettings
from workers.standalone import load_engine


def check_models(specs: list[ModelSpec], settings: WorkerSettings) -> None:
    """Raises typer.Exit(1) after the last one if any failed."""
    hush_libraries()
    problems = [problem for spec in specs for problem in _check(spec, settings)]
    for problem in problems:
        say(f"fewstep: {problem}", "bold red")
    if problems:
        raise typer.Exit(1)


def _check(spec: ModelSpec, settings: WorkerSettings) -> Iterator[str]:
    """Prints the table. Gives a line for each failure."""
    try:
        with console.status(f"loading {spec.name}"):
            engine = load_engine(spec, settings)
    except LoadError as error:
        yield str(error)
        return
    with console.status(f"drawing with {spec.name}"):
        warm_up(engine, spec)
        outcomes = [run_trial(engine, spec, trial) for trial in trials_of(spec)]
    output().print(_table(spec, outcomes))
    for outcome in outcomes:
        if outcome.problem:
            yield f"{spec.name}: {outcome.trial.rule}: {outcome.problem}"


def _table(spec: ModelSpec, outcomes: list[Outcome]) -> Table:
    headings = ("picture", "text ms", "steps ms", "decode ms")
    columns = [Column(heading, justify="right") for heading in headings]
    table = Table(Column(spec.name, no_wrap=True), *columns, box=None, pad_edge=False)
    for outcome in outcomes:
        steps_ms = " ".join(f"{ms:.1f}" for ms in outcome.steps_ms)
        verdict = "failed" if outcome.problem else "sound"
        table.add_row(outcome.trial.rule, verdict, f"{outcome.text_ms:.1f}", steps_ms, f"{outcome.decode_ms:.1f}")
    return table
