"""fewstep distill turbo, and the extraction of LoRAs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from commands.console import fail, format_bytes, one_line_errors, say
from commands.distilling import Options, Session, choose_compute, told
from models.catalog import load_catalog
from models.hub.needs import MODEL_INDEX
from models.loading import LoadError
from models.sources import SourceError, locate
from models.training.add import AddDistiller, AddSettings, WholeStudent, build_scheduler, student_timesteps
from models.training.entries import save_table, turbo_entry, turbo_lora_entry
from models.training.errors import ExtractError, TrainingError
from models.training.extract import CONFIG, Extract, Weights, extract
from models.training.features import TEACHER, Features, TeacherFeatures, load_classifier
from models.training.fingerprints import file_fingerprints, fingerprint
from models.training.lcm import Student
from workers.settings import WorkerSettings

LORA_RATE, WHOLE_RATE = 1e-4, 1e-5
LORA = "lora"  # the folder in OUT of what was extracted
USUAL_RANK = 64


@dataclass(frozen=True)
class TurboOptions:
    """What only this distillation is told: `lora` is the rank of what is extracted, `lora_only` of what is trained,
    `start` the folder of the LoRA that the latter begins as."""

    features: str
    lora: int | None
    lora_only: int | None
    start: Path | None
    half: bool

    @property
    def saved_dtype(self) -> torch.dtype:
        return torch.float16 if self.half else torch.float32


def distill_turbo(options: Options, own: TurboOptions, settings: AddSettings) -> None:
    """From a teacher to a Turbo model on disk."""
    rank = own.lora_only
    with told(options, "give --lora-only" if rank is None else f"lower --lora-only ({rank} now)"):
        if own.lora and rank:
            raise TrainingError(f"--lora {own.lora} and --lora-only {rank}: what is trained as a LoRA is one already")
        started = _fingerprint_of_start(own)
        session = Session(options)
        teacher, compute = session.teacher, session.compute
        scheduler = build_scheduler(teacher)
        given = None if own.features == TEACHER else load_classifier(Path(own.features), compute)
        batches, sheet = session.encode(scheduler, 0.0)
        student = session.make_student(rank, WholeStudent, own.start)
        distiller = AddDistiller(
            student,
            given or _teacher_features(session, student),
            teacher.build_diffusion(compute.device),
            student_timesteps(scheduler, settings.student_timesteps),
            batches,
            options.out,
            session.train_settings(WHOLE_RATE if rank is None else LORA_RATE),
            settings,
            compute,
            {**session.identity, "lora_only": rank, "start": started},
        )
        distiller.distill(session.saving(student, scheduler, own.saved_dtype, sheet, distiller.trainer))
        if own.lora:
            with distiller.trainer.averaged_weights():
                _extract_student(session, student, scheduler, own, settings.student_timesteps)
        make_entry = turbo_entry if rank is None else turbo_lora_entry
        session.announce(make_entry(teacher, session.size, options.out, settings.student_timesteps))


def _fingerprint_of_start(own: TurboOptions) -> str | None:
    """Raises TrainingError where nothing can start so."""
    if own.start is None:
        return None
    if own.lora_only is None:
        raise TrainingError(f"--start {own.start} is for --lora-only: a whole network starts as its teacher")
    file = own.start / LORA_WEIGHT_NAME_SAFE
    if not file.is_file():
        raise TrainingError(f"--start {own.start}: the folder of a LoRA is needed, with {LORA_WEIGHT_NAME_SAFE}")
    return fingerprint(file_fingerprints([file]))


def _teacher_features(session: Session, student: Student) -> Features:
    with student.teacher() as frozen:
        return TeacherFeatures(frozen, session.teacher.build_diffusion(session.compute.device), session.compute)


def _extract_student(session: Session, student: Student, scheduler: Any, own: TurboOptions, num_steps: int) -> None:
    """A LoRA beside the whole model, with a catalog entry of its own."""
    teacher, folder, name = session.teacher, session.options.out / LORA, f"{session.name}-lora"
    _, unet_folder = teacher.networks["unet"]
    base = Weights.of_folder(unet_folder, teacher.variant)
    tuned = Weights.of_network(student.unet, "the student")
    _write(extract(base, tuned, own.lora, device=session.compute.device), folder, own.saved_dtype)
    scheduler.save_pretrained(folder)
    save_table(name, turbo_lora_entry(teacher, session.size, folder, num_steps), folder)


def extract_lora(
    base: str, tuned: str, out: Path, rank: int | None, keep: float | None, half: bool, device: str | None
) -> None:
    """Of any two models of one architecture."""
    try:
        with one_line_errors():
            if rank and keep:
                raise ExtractError(f"--rank {rank} and --keep {keep:g}: one of them says the other")
            _check_free(out)
            chosen = USUAL_RANK if rank is None and keep is None else rank
            target = choose_compute(device).device
            made = extract(_open(base), _open(tuned), chosen, keep, target)
            _write(made, out, torch.float16 if half else torch.float32)
    except (TrainingError, LoadError, SourceError) as error:
        fail(str(error))
    except (torch.OutOfMemoryError, MemoryError):
        fail("there is too little memory for the largest layer: give --device cpu", status=1)


def _check_free(out: Path) -> None:
    """Raises ExtractError where the LoRA would lie among a model's files."""
    for name in (MODEL_INDEX, CONFIG):
        if (out / name).exists():
            raise ExtractError(f"--out {out} has a model in it, its {name}: give another folder")


def _open(name: str) -> Weights:
    """Of an entry of the catalog, or of a folder."""
    settings = WorkerSettings.load()
    catalog = load_catalog(settings.catalog, settings.extra_catalog)
    if name not in catalog:
        return Weights.of_folder(Path(name))
    spec = catalog[name]
    if spec.is_single_file and not spec.unet:
        raise ExtractError(f"{name} is a single file: a folder that diffusers wrote is needed")
    return Weights.of_folder(locate(spec, "unet" if spec.unet else "source").path, spec.variant)


def _write(made: Extract, folder: Path, dtype: torch.dtype) -> None:
    made.save(folder, dtype)
    path = folder / LORA_WEIGHT_NAME_SAFE
    say(
        f"{path}: rank {made.rank}, {len(made.layers)} layers, {format_bytes(path.stat().st_size)}; "
        f"it holds {made.kept:.1%} of what the layers differ in"
    )
    if made.left_out > 0:
        say(f"{made.left_out:.1%} of all difference is in biases and norms, where a LoRA has no place")
