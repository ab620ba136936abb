"""What the programs of fewstep distill share, and the LCM's: open the teacher, encode the data, train, write, say."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import typer
from diffusers import LCMScheduler

from commands.console import fail, one_line_errors, say
from models.catalog import load_catalog
from models.catalog.specs import LATENT_UNIT
from models.loading import LoadError, default_device, default_dtype
from models.sources import SourceError
from models.training.entries import full_lcm_entry, lcm_lora_entry, save_table
from models.training.errors import Interrupted, TrainingError
from models.training.exporting import copy_unet, save_pipeline
from models.training.lcm import RUN, Distiller, FullStudent, LcmSettings, LoraStudent, save_lora
from models.training.mini.painting import drawable_vocabulary, paint
from models.training.pictures import Batches, PictureCache, encode_pictures, find_pictures
from models.training.samples import SampleSheet
from models.training.teachers import NAMES, Encoders, Size, Teacher, open_teacher
from models.training.trainer import Compute, Identity, TrainSettings
from workers.settings import WorkerSettings

MINI = "mini"
BATCH_SIZES = {"sd": 8, "sdxl": 4}
LORA_RATE, FULL_RATE = 1e-4, 8e-6
SAVED_DTYPE = torch.float16
OUT_OF_MEMORY = "can't allocate memory"  # torch on a CPU, where it is a plain RuntimeError


@dataclass(frozen=True)
class Options:
    """What every distillation is told. None is for whoever knows the teacher to choose."""

    teacher: str
    data: str
    out: Path
    steps: int
    size: str | None
    batch_size: int | None
    accumulate: int
    rate: float | None
    ema_decay: float
    caption_dropout: float
    seed: int
    save_every: int
    device: str | None
    dtype: str | None
    gradient_checkpointing: bool
    prompts: tuple[str, ...]
    num_painted: int
    cache: Path | None
    name: str | None


class Session:
    """The options made sense of: teacher, device, size. Raises TrainingError, LoadError, SourceError."""

    def __init__(self, options: Options) -> None:
        self.options = options
        settings = WorkerSettings.load()
        self.compute = choose_compute(options.device, options.dtype)
        self.teacher = open_teacher(options.teacher, load_catalog(settings.catalog, settings.extra_catalog))
        self.size = _parse_size(options.size, self.teacher)
        self.batch_size = options.batch_size or BATCH_SIZES[self.teacher.layout]
        width, height = self.size
        what = f"{NAMES[self.teacher.layout]}, {self.teacher.build_diffusion(self.compute.device).prediction_type}"
        where = f"{self.compute.device} in {_name_of(self.compute.dtype)}"
        say(f"teacher: {self.teacher.name} ({what}), {width}x{height} pixels, on {where}")

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of frozen networks: a GPU holds them in what it computes in."""
        return self.compute.dtype if self.compute.device.type == "cuda" else torch.float32

    def load_batches(self, encoders: Encoders) -> Batches:
        """Encodes the pictures, unless an earlier run did."""
        options, cache = self.options, self.options.cache or self.options.out / RUN / "cache"
        if options.data == MINI:
            vocabulary = drawable_vocabulary()
            things = "emoji and shapes" if vocabulary.emoji else "shapes only, since the font of the emoji isn't here"
            say(f"data: {options.num_painted} painted pictures of {things}")
            size, share = self.size, options.caption_dropout
            return paint(vocabulary, encoders, size, cache, self.batch_size, share, options.num_painted)
        pictures = find_pictures(Path(options.data))
        say(f"data: {len(pictures)} pictures of {options.data}")
        return PictureCache(
            encode_pictures(pictures, encoders, self.size, cache), self.batch_size, options.caption_dropout
        )

    def train_settings(self, rate: float) -> TrainSettings:
        options = self.options
        return TrainSettings(
            steps=options.steps,
            rate=rate if options.rate is None else options.rate,
            warmup=min(100, options.steps // 10),
            ema_decay=options.ema_decay,
            weight_decay=0,
            save_every=options.save_every,
            seed=options.seed,
            accumulate=options.accumulate,
        )

    @property
    def identity(self) -> Identity:
        width, height = self.size
        return {
            "teacher": self.teacher.fingerprint_of("unet"),
            "size": f"{width}x{height}",
            "dtype": _name_of(self.compute.dtype),
        }

    @property
    def name(self) -> str:
        """What the catalog calls the result."""
        return self.options.name or self.options.out.resolve().name

    def announce(self, entry: dict[str, Any]) -> None:
        """Write the entry beside the model, print it, and say how to serve it."""
        out, name = self.options.out, self.name
        path = save_table(name, entry, out)
        say(f"\n{path.read_text(encoding='utf-8')}")
        say(f"{out} is ready. To serve it, with this entry from {path}:", "bold green")
        say(f"FEWSTEP_EXTRA_CATALOG={shlex.quote(str(path))} fewstep serve --model {shlex.quote(name)}")


def distill_lcm(options: Options, rank: int | None, solver_timesteps: int, guidance: tuple[float, float]) -> None:
    """`rank` of the LoRA; None for a whole network."""
    with told(options, "leave --full out" if rank is None else f"lower --rank ({rank} now)"):
        _check_guidance(guidance)
        session = Session(options)
        teacher, compute = session.teacher, session.compute
        scheduler = teacher.build_scheduler(LCMScheduler, original_inference_steps=solver_timesteps)
        encoders = teacher.load_encoders(compute.device)
        batches = session.load_batches(encoders)
        sheet = make_sheet(session, encoders, scheduler, 0.0 if rank else sum(guidance) / 2)
        del encoders
        student = _make_student(session, rank)
        distiller = Distiller(
            student,
            teacher.build_diffusion(compute.device),
            batches,
            options.out,
            session.train_settings(LORA_RATE if rank else FULL_RATE),
            LcmSettings(solver_timesteps, *guidance),
            compute,
            {**session.identity, "rank": rank},
        )

        def save() -> None:
            _save(session, student, scheduler)
            if sheet is not None:
                step = distiller.trainer.step
                sheet.save(student.unet, compute, options.out / RUN / "samples" / f"step-{step:06}.png")

        distiller.distill(save)
        session.announce(_entry_of(session, student, solver_timesteps, guidance))


def make_sheet(session: Session, encoders: Encoders, scheduler: Any, guidance_scale: float) -> SampleSheet | None:
    prompts = session.options.prompts
    return SampleSheet(prompts, encoders, session.size, scheduler, guidance_scale) if prompts else None


def _make_student(session: Session, rank: int | None) -> LoraStudent | FullStudent:
    teacher, device = session.teacher, session.compute.device
    torch.manual_seed(session.options.seed)
    student: LoraStudent | FullStudent
    if rank is not None:
        student = LoraStudent(teacher.load_unet(device, session.weights_dtype), rank)
    else:
        student = FullStudent(teacher.load_unet(device, torch.float32), session.weights_dtype)
    if session.options.gradient_checkpointing:
        student.unet.enable_gradient_checkpointing()
    say_student(student.unet, rank)
    return student


def say_student(unet: Any, rank: int | None) -> None:
    num_trained = sum(weight.numel() for weight in unet.parameters() if weight.requires_grad)
    what = "a whole network" if rank is None else f"a LoRA of rank {rank}"
    say(f"student: {what}, {num_trained:,} weights to train")


def _save(session: Session, student: LoraStudent | FullStudent, scheduler: Any) -> None:
    out, teacher = session.options.out, session.teacher
    if isinstance(student, LoraStudent):
        save_lora(student.unet, out, SAVED_DTYPE)
        scheduler.save_pretrained(out)
    else:
        save_pipeline(teacher.build_pipeline(copy_unet(student.unet, SAVED_DTYPE), scheduler, SAVED_DTYPE), out)


def _entry_of(
    session: Session, student: LoraStudent | FullStudent, solver_timesteps: int, guidance: tuple[float, float]
) -> dict[str, Any]:
    teacher, size, out = session.teacher, session.size, session.options.out
    if isinstance(student, LoraStudent):
        return lcm_lora_entry(teacher, size, out, solver_timesteps)
    return full_lcm_entry(teacher, size, out, solver_timesteps, guidance)


@contextmanager
def told(options: Options, last_way: str) -> Iterator[None]:
    """Whatever ends a distillation early is one line. `last_way` is what else needs less memory."""
    try:
        with one_line_errors():
            yield
    except (TrainingError, LoadError, SourceError) as error:
        fail(str(error))
    except Interrupted as stop:
        say(f"{stop}. The same command goes on there.", "bold yellow")
        raise typer.Exit(130) from stop
    except (torch.OutOfMemoryError, MemoryError):
        _fail_for_memory(options, last_way)
    except RuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        _fail_for_memory(options, last_way)


def _fail_for_memory(options: Options, last_way: str) -> NoReturn:
    """Names what can be lowered, the cheapest first."""
    ways = [] if options.gradient_checkpointing else ["add --gradient-checkpointing"]
    ways.append(f"lower --batch-size ({options.batch_size or 'its default'} now; --accumulate makes up for it)")
    ways.append(f"lower --size ({options.size or 'the teacher’s own'} now)")
    ways.append(last_way)
    fail(f"there is too little memory for this training: {', or '.join(ways)}", status=1)


def choose_compute(device_name: str | None, dtype: str | None = None) -> Compute:
    """Raises TrainingError for a device that isn't there."""
    try:
        device = torch.device(device_name) if device_name else default_device()
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f"--device {device_name}: {str(error).splitlines()[0]}") from error
    return Compute(device, getattr(torch, dtype) if dtype else _best_dtype(device))


def _best_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return default_dtype(device)


def _parse_size(text: str | None, teacher: Teacher) -> Size:
    """ "512" or "768x512"."""
    if text is None:
        return teacher.default_size
    sides = text.split("x") if "x" in text else [text, text]
    if len(sides) != 2 or not all(
        side.isdecimal() and int(side) > 0 and int(side) % LATENT_UNIT == 0 for side in sides
    ):
        raise TrainingError(f"--size {text}: N or WxH is needed, in multiples of {LATENT_UNIT} pixels")
    return int(sides[0]), int(sides[1])


def _check_guidance(guidance: tuple[float, float]) -> None:
    low, high = guidance
    if not 1 <= low <= high:
        raise TrainingError(f"--guidance {low:g} {high:g}: two numbers are needed, 1 <= LOW <= HIGH")


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
