"""fewstep distill: few-step models from one's own checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # torch comes with it
    from commands.distilling import Options

distill_app = typer.Typer(help="Makes few-step models of your own, to be served by fewstep.", no_args_is_help=True)


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"


TeacherArgument = Annotated[
    str, typer.Argument(help="The model to learn from: a folder that diffusers wrote, or an entry of the catalog.")
]
DataOption = Annotated[
    str,
    typer.Option(
        metavar="FOLDER|mini",
        help="Pictures with captions: metadata.jsonl with file_name and text a line, or a .txt beside each picture. "
        "mini: the bundled miniature's own, painted here.",
    ),
]
OutOption = Annotated[
    Path, typer.Option(help="Where the result goes, and in its folder training what the run needs to go on.")
]
StepsOption = Annotated[int, typer.Option(min=1, help="Training steps in all.")]
SizeOption = Annotated[
    str | None, typer.Option(metavar="N|WxH", help="Size of the pictures in pixels; the teacher's own if none.")
]
BatchSizeOption = Annotated[int | None, typer.Option(min=1, help="Pictures in a batch; by default 8, and 4 for SDXL.")]
AccumulateOption = Annotated[int, typer.Option(min=1, help="Batches in a step: more of them cost time, and no memory.")]
EmaDecayOption = Annotated[float, typer.Option(min=0.0, max=0.99999, help="How slowly the averaged student follows.")]
DropoutOption = Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the captions that is left out.")]
SaveEveryOption = Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")]
DeviceOption = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu; a GPU where there is one, if none.")]
DtypeOption = Annotated[
    Dtype | None, typer.Option(help="What the networks compute in; bfloat16 where the device can, if none.")
]
CheckpointingOption = Annotated[
    bool,
    typer.Option("--gradient-checkpointing", help="Much less memory for about a third more time per step."),
]
PaintedOption = Annotated[
    int | None, typer.Option("--pictures", min=1, help="How many pictures to paint, for --data mini; 10,000 if none.")
]
PromptsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sample", help="A prompt to draw at 1, 2 and 4 steps with each checkpoint; may be given several times."
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, max=2**53 - 1, help="Same seed, same run.")]
CacheOption = Annotated[
    Path | None, typer.Option(help="Where encoded pictures are kept; in OUT if none. Runs may share it.")
]
NameOption = Annotated[str | None, typer.Option(help="What the catalog shall call the model; the name of OUT if none.")]


def _options(given: Mapping[str, Any]) -> Options:
    """Of all that a command was given, what every distillation is told."""
    from commands.distilling import Options

    return Options(**{field.name: given[field.name] for field in fields(Options)})


@distill_app.command()
def lcm(
    teacher: TeacherArgument,
    data: DataOption,
    out: OutOption,
    full: Annotated[
        bool, typer.Option("--full", help="A whole network that reads the guidance scale, instead of a LoRA.")
    ] = False,
    steps: StepsOption = 4000,
    size: SizeOption = None,
    batch_size: BatchSizeOption = None,
    accumulate: AccumulateOption = 1,
    rate: Annotated[
        float | None, typer.Option(min=1e-9, help="Learning rate; by default 1e-4 for a LoRA, 8e-6 with --full.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the LoRA: its size, and how much it can learn; 64 if none.")
    ] = None,
    solver_timesteps: Annotated[
        int, typer.Option(min=1, max=1000, help="Timesteps of the teacher's DDIM; 50 skips 20 of 1000 at a time.")
    ] = 50,
    guidance: Annotated[
        tuple[float, float],
        typer.Option(metavar="LOW HIGH", help="Guidance scales of the teacher to learn; twice the same for one."),
    ] = (3.0, 15.0),
    huber: Annotated[
        float, typer.Option(min=1e-6, help="Difference up to which the loss is square; it is straight beyond.")
    ] = 1e-3,
    ema_decay: EmaDecayOption = 0.95,
    caption_dropout: DropoutOption = 0.1,
    seed: SeedOption = 0,
    save_every: SaveEveryOption = 500,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    gradient_checkpointing: CheckpointingOption = False,
    prompts: PromptsOption = None,
    num_painted: PaintedOption = None,
    cache: CacheOption = None,
    name: NameOption = None,
) -> None:
    """Distils a Stable Diffusion or SDXL model so that it draws in 1 to 8 steps: latent consistency distillation.

    The result is an LCM-LoRA, or with --full a whole model, as diffusers users load it. Ctrl-C writes a checkpoint; the
    same command goes on there. At the end it prints the catalog entry that serves the model.

    Example: fewstep distill lcm ./my-model --data ./pictures --out ./my-lcm --sample "a red fox in snow"
    """
    from commands.console import hush_libraries

    hush_libraries()  # before anything of them is imported that prints
    from commands.lcm import LcmOptions, distill_lcm

    distill_lcm(_options(locals()), LcmOptions(full, rank, solver_timesteps, guidance, huber))


@distill_app.command()
def turbo(
    teacher: TeacherArgument,
    data: DataOption,
    out: OutOption,
    lora: Annotated[
        int | None, typer.Option(metavar="RANK", min=1, help="Extracts the result as a LoRA of this rank besides.")
    ] = None,
    lora_only: Annotated[
        int | None,
        typer.Option(metavar="RANK", min=1, help="Trains a LoRA of this rank instead of the whole network."),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="An LCM-LoRA of the teacher, of the same rank, which --lora-only goes on from."
        ),
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            metavar="teacher|FOLDER",
            help="What the discriminator looks through: the teacher's own encoder, or a frozen LatentClassifier.",
        ),
    ] = "teacher",
    timesteps: Annotated[
        int, typer.Option(min=1, max=1000, help="Timesteps that the student is trained at; 4 serve 1, 2 and 4 steps.")
    ] = 4,
    guidance: Annotated[
        float, typer.Option(min=1.0, help="Guidance scale of the teacher that is learnt; 1 is none.")
    ] = 3.0,
    noise_share: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Share of pictures begun with noise alone; by default an even one."),
    ] = None,
    distillation: Annotated[
        float, typer.Option(min=0.0, help="Weight of the teacher's opinion beside the discriminator's.")
    ] = 2.5,
    r1: Annotated[float, typer.Option(min=0.0, help="Weight of the penalty that keeps the discriminator smooth.")] = (
        1e-5
    ),
    steps: StepsOption = 4000,
    size: SizeOption = None,
    batch_size: BatchSizeOption = None,
    accumulate: AccumulateOption = 1,
    rate: Annotated[
        float | None, typer.Option(min=1e-9, help="Learning rate; by default 1e-5, and 1e-4 with --lora-only.")
    ] = None,
    heads_rate: Annotated[float, typer.Option(min=1e-9, help="Learning rate of the discriminator.")] = 1e-4,
    ema_decay: EmaDecayOption = 0.998,
    caption_dropout: DropoutOption = 0.1,
    seed: SeedOption = 0,
    save_every: SaveEveryOption = 500,
    half: Annotated[bool, typer.Option("--fp16/--fp32", help="Precision of the files that are written.")] = True,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    gradient_checkpointing: CheckpointingOption = False,
    prompts: PromptsOption = None,
    num_painted: PaintedOption = None,
    cache: CacheOption = None,
    name: NameOption = None,
) -> None:
    """Distils a Stable Diffusion or SDXL model so that it draws in 1 to 4 steps: adversarial diffusion distillation.

    The result is a whole model without guidance, as SDXL-Turbo is one, or with --lora-only a LoRA. Ctrl-C writes a
    checkpoint; the same command goes on there. At the end it prints the catalog entry that serves the model.

    Example: fewstep distill turbo ./my-model --data ./pictures --out ./my-turbo --lora 64
    """
    from commands.console import hush_libraries

    hush_libraries()
    from commands.turbo import TurboOptions, distill_turbo
    from models.training.add import AddSettings

    settings = AddSettings(timesteps, distillation, guidance, r1, heads_rate, noise_share)
    distill_turbo(_options(locals()), TurboOptions(features, lora, lora_only, start, half), settings)


Weights = Annotated[str, typer.Argument(help="A folder of diffusers, a UNet's folder, or an entry of the catalog.")]


@distill_app.command()
def extract(
    base: Weights,
    tuned: Weights,
    out: Annotated[Path, typer.Option(help="Folder for the LoRA.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Its rank; 64 if neither this nor --keep is given.")] = None,
    keep: Annotated[
        float | None,
        typer.Option(min=0.01, max=1.0, help="Share of the difference to keep: takes the smallest rank that does."),
    ] = None,
    half: Annotated[bool, typer.Option("--fp16/--fp32", help="Precision of the file.")] = True,
    device: DeviceOption = None,
) -> None:
    """Extracts what TUNED has beyond BASE as a LoRA: any two models of one architecture, such as SDXL and SDXL-Turbo.

    Says how much of the difference the LoRA holds.

    Example: fewstep distill extract ./sdxl-base ./sdxl-turbo --rank 64 --out ./turbo-lora
    """
    from commands.console import hush_libraries

    hush_libraries()
    from commands.turbo import extract_lora

    extract_lora(base, tuned, out, rank, keep, half, device)
