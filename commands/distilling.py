"""What the programs of fewstep distill share: open the teacher, encode the data, make a student, write, say."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import typer
from safetensors import SafetensorError

from commands.console import fail, one_line_errors, say
from models.catalog import load_catalog
from models.catalog.specs import LATENT_UNIT
from models.hub.needs import MODEL_INDEX
from models.loading import LoadError, default_device, default_dtype
from models.networks import first_line
from models.sources import SourceError
from models.training.entries import save_table
from models.training.errors import Interrupted, TrainingError
from models.training.exporting import copy_unet, save_pipeline
from models.training.fingerprints import fingerprint
from models.training.lcm import RUN, LoraStudent, Student, save_lora
from models.training.mini.painting import drawable_vocabulary, paint
from models.training.pictures import Batches, PictureCache, encode_pictures, find_pictures
from models.training.samples import SampleSheet
from models.training.teachers import NAMES, Encoders, Size, Teacher, open_teacher
from models.training.trainer import Compute, Identity, Trainer, TrainSettings
from workers.settings import WorkerSettings

MINI = "mini"
BATCH_SIZES = {"sd": 8, "sdxl": 4}
NUM_PAINTED = 10_000
OUT_OF_MEMORY = "can't allocate memory"  # torch on a CPU, where it is a plain RuntimeError

Whole = TypeVar("Whole", bound=Student)


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
    prompts: Sequence[str] | None
    num_painted: int | None
    cache: Path | None
    name: str | None


class Session:
    """The options made sense of: teacher, device, size. Raises TrainingError, LoadError, SourceError."""

    def __init__(self, options: Options) -> None:
        self.options = options
        if options.num_painted and options.data != MINI:
            raise TrainingError(f"--pictures {options.num_painted} is for --data {MINI}; of a folder all are taken")
        settings = WorkerSettings.load()
        self.compute = choose_compute(options.device, options.dtype)
        self.teacher = open_teacher(options.teacher, load_catalog(settings.catalog, settings.extra_catalog))
        _check_out(options.out, self.teacher)
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

    def encode(self, scheduler: Any, guidance_scale: float) -> tuple[Batches, SampleSheet | None]:
        """What to learn from, and the sheet of the prompts, if there are any. The encoders leave memory with it."""
        encoders, prompts = self.teacher.load_encoders(self.compute.device), self.options.prompts
        batches = self._load_batches(encoders)
        return batches, SampleSheet(prompts, encoders, self.size, scheduler, guidance_scale) if prompts else None

    def make_student(
        self, rank: int | None, whole: Callable[[Any, torch.dtype], Whole], start: Path | None = None
    ) -> LoraStudent | Whole:
        """A LoRA of this rank, which may `start` as another one, or a `whole` network."""
        teacher, device = self.teacher, self.compute.device
        torch.manual_seed(self.options.seed)
        student: LoraStudent | Whole
        if rank is not None:
            student = LoraStudent(teacher.load_unet(device, self.weights_dtype), rank, start=start)
        else:
            student = whole(teacher.load_unet(device, torch.float32), self.weights_dtype)
        if self.options.gradient_checkpointing:
            student.unet.enable_gradient_checkpointing()
            with student.teacher() as frozen:
                frozen.enable_gradient_checkpointing()
        num_trained = sum(weight.numel() for weight in student.unet.parameters() if weight.requires_grad)
        what = "a whole network" if rank is None else f"a LoRA of rank {rank}"
        say(f"student: {what}, {num_trained:,} weights to train")
        return student

    def saving(
        self, student: Student, scheduler: Any, dtype: torch.dtype, sheet: SampleSheet | None, trainer: Trainer
    ) -> Callable[[], None]:
        """What is done at each checkpoint: write the result, and the sheet."""

        def save() -> None:
            self._write(student, scheduler, dtype)
            if sheet is not None:
                path = self.options.out / RUN / "samples" / f"step-{trainer.step:06}.png"
                sheet.save(student.unet, self.compute, path)

        return save

    def _write(self, student: Student, scheduler: Any, dtype: torch.dtype) -> None:
        out = self.options.out
        if isinstance(student, LoraStudent):
            save_lora(student.unet, out, dtype)
            scheduler.save_pretrained(out)
        else:
            save_pipeline(self.teacher.build_pipeline(copy_unet(student.unet, dtype), scheduler, dtype), out)

    def _load_batches(self, encoders: Encoders) -> Batches:
        """Encodes the pictures, unless an earlier run did."""
        options, cache = self.options, self.options.cache or self.options.out / RUN / "cache"
        if options.data == MINI:
            vocabulary, count = drawable_vocabulary(), options.num_painted or NUM_PAINTED
            things = "emoji and shapes" if vocabulary.emoji else "shapes only, since the font of the emoji isn't here"
            say(f"data: {count} painted pictures of {things}")
            size, share = self.size, options.caption_dropout
            return paint(vocabulary, encoders, size, cache, self.batch_size, share, count)
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
            "teacher's scheduler": fingerprint(dict(self.teacher.scheduler_config)),
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


@contextmanager
def told(options: Options, last_way: str) -> Iterator[None]:
    """Whatever ends a distillation early is one line. `last_way` is what else needs less memory."""
    try:
        with one_line_errors():
            yield
    except (TrainingError, LoadError, SourceError) as error:
        fail(str(error))
    except SafetensorError as error:
        fail(f"weights can't be written or read; is the disk full? {first_line(error)}")
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


def _check_out(out: Path, teacher: Teacher) -> None:
    """Raises TrainingError where the result would take a model's place."""
    if out.exists() and not out.is_dir():
        raise TrainingError(f"--out {out} is a file: a folder is needed")
    written = {folder.resolve() for folder in (out, *(out / name for name in teacher.networks))}
    if written & {folder.resolve() for _, folder in teacher.networks.values()}:
        raise TrainingError(f"--out {out} is the teacher's own folder, which would be overwritten: give another one")
    if (out / MODEL_INDEX).exists() and not (out / RUN).exists():
        raise TrainingError(f"--out {out} has another model in it, which would be overwritten: give another folder")


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


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
