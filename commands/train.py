"""fewstep train: models of our own, made from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from commands.console import fail, one_line_errors, say

train_app = typer.Typer(help="Makes the bundled miniature models anew.", no_args_is_help=True)


@train_app.callback()
def _group() -> None:
    """A group, though it has one command so far."""


@train_app.command()
def mini(
    stages: Annotated[
        list[str] | None, typer.Argument(metavar="[STAGE]...", help="Only these, in this order; all of them if none.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, logs and results.")] = Path("runs/mini"),
    bundled: Annotated[
        Path | None, typer.Option(help="Where the export stage puts the models; the bundled ones' folder if none.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="Finished miniatures (a folder like models/bundled) to go on from.")
    ] = None,
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of all steps and pictures: less to try it.")] = 1.0,
) -> None:
    """Trains the miniatures, stage by stage: see models/training/mini/recipe.py.

    It takes many hours of two CPU cores. Ctrl-C writes a checkpoint; the same command goes on there. Emoji need the
    font of Debian's package fonts-noto-color-emoji; without it only shapes are drawn, which don't ship.
    """
    from commands.console import hush_libraries

    hush_libraries()
    from models.training.errors import Interrupted, TrainingError
    from models.training.mini.export import BUNDLED
    from models.training.mini.painting import drawable_vocabulary
    from models.training.mini.recipe import Recipe

    vocabulary = drawable_vocabulary()
    recipe = Recipe(out, vocabulary, share, start, bundled or BUNDLED)
    unknown = [stage for stage in stages or () if stage not in recipe.stages]
    if unknown:
        fail(f"there is no stage {unknown[0]}; there are {', '.join(recipe.stages)}")
    if not vocabulary.emoji and bundled is None and "export" in (stages or recipe.stages):
        fail("the font of the emoji isn't here: install fonts-noto-color-emoji, or give --bundled another folder")
    try:
        with one_line_errors():
            for stage in stages or recipe.stages:
                say(f"stage {stage}")
                recipe.stages[stage]()
    except TrainingError as error:
        fail(str(error))
    except Interrupted as stop:
        say(f"{stop}. The same command goes on there.", "bold yellow")
        raise typer.Exit(130) from stop
