"""The recipe of the miniatures that ship: every stage with its settings, in order. `fewstep train mini` follows it.

Each stage writes a folder of its own below `out`, goes on where it was interrupted, and does nothing when it is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, LCMScheduler
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from transformers import CLIPTokenizer

from models.training import add
from models.training.entries import lcm_lora_entry, save_table, turbo_lora_entry
from models.training.errors import TrainingError
from models.training.exporting import copy_unet
from models.training.features import TeacherFeatures
from models.training.lcm import Distiller, FullStudent, LcmSettings, LoraStudent, save_lora
from models.training.mini import autoencoder
from models.training.mini.export import BUNDLED, export_lora, export_pipeline, export_tiny, export_unet, shipment
from models.training.mini.features import train_classifier
from models.training.mini.latents import LatentCache, encode_scenes
from models.training.mini.linear_code import LinearCode
from models.training.mini.networks import Networks, build_networks
from models.training.mini.reference import save_reference
from models.training.mini.restyling import STYLES
from models.training.mini.sprites import draw_sprites
from models.training.mini.style import train_style
from models.training.mini.teacher import CaptionedLatents, PaintedBatches, start_from, train_jointly, warm_up
from models.training.mini.tokenizer import build_tokenizer, save_tokenizer
from models.training.mini.vocabulary import Vocabulary
from models.training.teachers import Layout, Teacher, open_teacher
from models.training.trainer import CPU, Compute, TrainSettings

NUM_PICTURES = 80_000
BATCH = 48
LORA_RANK = 12
TURBO_RANK = 20
LCM = LcmSettings(solver_timesteps=20, min_guidance=3.0, max_guidance=3.0)  # where this teacher draws best
LCM_XL = LcmSettings(solver_timesteps=10, min_guidance=5.0, max_guidance=5.0, huber=0.03)
LCM_FULL = replace(LCM_XL, min_guidance=2.0)
TURBO = add.AddSettings(guidance=8.0, heads_rate=2e-3)
TURBO_RUNS = {
    "turbo-1": (1000, replace(TURBO, distillation=8.0, noise_share=0.5)),
    "turbo-2": (800, replace(TURBO, distillation=12.0, noise_share=0.6)),
    "turbo": (700, replace(TURBO, distillation=16.0, noise_share=0.8)),
}
"""Folder, steps and settings. Each run goes on from the one before, with more weight on single step and teacher."""
TEACHERS: dict[Layout, str] = {"sd": "teacher", "sdxl": "teacher-xl"}
PIPELINES = {"teacher": "mini-sd", "teacher-xl": "mini-sdxl"}  # by stage, as they ship
LORAS = {"lcm": "mini-lcm-lora", "turbo": "mini-turbo-lora", **{style: f"mini-{style}" for style in STYLES}}


@dataclass(frozen=True)
class Recipe:
    """`share` of all steps and pictures: less than 1 to try it. `start` is a folder of finished miniatures: decoder and
    teacher go on from its mini-sd, instead of from nothing."""

    out: Path
    vocabulary: Vocabulary
    share: float = 1.0
    start: Path | None = None
    bundled: Path = BUNDLED

    @property
    def stages(self) -> dict[str, Callable[[], None]]:
        """By name, in order."""
        return {
            "autoencoder": self.autoencoder,
            "latents": self.latents,
            "teacher": self.teacher,
            "lcm": self.lcm,
            "teacher-xl": self.teacher_xl,
            "lcm-full": self.lcm_full,
            "lcm-xl": self.lcm_xl,
            "features": self.features,
            "turbo": self.turbo,
            "styles": self.styles,
            "export": self.export,
        }

    def autoencoder(self) -> None:
        """The KL autoencoder and the tiny one, in pixels."""
        folder = self.out / "autoencoder"
        source = autoencoder.PictureSource(self.vocabulary, batch_size=24)
        code_file = folder / "code.safetensors"
        if not code_file.exists():
            autoencoder.fit_code(self.vocabulary).save(code_file)
        torch.manual_seed(0)
        vae = autoencoder.load_decoder(self.start / "mini-sd") if self.start else autoencoder.build_kl()
        code, settings = LinearCode.load(code_file), self._settings(600 if self.start else 4000, 2e-3, ema_decay=0.98)
        vae = autoencoder.train_kl(source, code, folder, settings, vae)
        settings = self._settings(1200, 2e-3, ema_decay=0.98, seed=1)
        tiny = autoencoder.train_tiny(source, autoencoder.vae_encoder(vae), folder, settings, autoencoder.build_tiny())
        autoencoder.report(source, vae, tiny, seed=2)

    def latents(self) -> None:
        """What the denoisers learn from."""
        folder = self.out / "latents"
        if not LatentCache.exists(folder):
            encode = autoencoder.vae_encoder(self._vae)
            encode_scenes(self.vocabulary, encode, self._scaled(NUM_PICTURES)).save(folder)

    def teacher(self) -> None:
        """Text encoders and UNet in SD's layout, a diffusers folder in `model`."""
        folder, start = self.out / TEACHERS["sd"], self.start / "mini-sd" if self.start else None
        if not (folder / "tokenizer").exists():
            new = CLIPTokenizer.from_pretrained(start / "tokenizer") if start else build_tokenizer(self.vocabulary)
            save_tokenizer(new, folder / "tokenizer")
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        torch.manual_seed(0)
        networks = build_networks("sd", tokenizer)
        if start:
            start_from(networks, start, variant="fp16")
        else:
            warm_up(networks, self._data(tokenizer), folder, self._settings(4000, 1e-3, save_every=1000))
        steps, rate = (9_000, 6e-4) if start else (24_000, 1e-3)
        self._train_teacher(networks, folder, folder / "tokenizer", steps, rate)

    def teacher_xl(self) -> None:
        """The same in SDXL's layout. Its first text encoder starts as the other teacher's, as SDXL's is that of Stable
        Diffusion, so it needs no warm-up."""
        model = self.out / TEACHERS["sd"] / "model"
        torch.manual_seed(0)
        networks = build_networks("sdxl", CLIPTokenizer.from_pretrained(model / "tokenizer"))
        start_from(networks, model, ["text_encoder"])
        self._train_teacher(networks, self.out / TEACHERS["sdxl"], model / "tokenizer", 13_000, 1e-3)

    def lcm(self) -> None:
        """The LCM-LoRA of the teacher in SD's layout, with its guidance."""
        settings = self._settings(800, 4e-4, ema_decay=0.95, seed=2)
        self._lcm_lora(self._open("sd"), self.out / "lcm", LORA_RANK, settings, LCM)

    def lcm_full(self) -> None:
        """A full LCM of the teacher in SDXL's layout, which reads the guidance scale. It ships as a UNet alone, as
        SDXL's full LCM does: the rest is the teacher's."""
        teacher, folder = self._open("sdxl"), self.out / "lcm-full"
        torch.manual_seed(3)
        student = FullStudent(teacher.load_unet(CPU, torch.float32), torch.float32)
        self._distill(teacher, student, folder, self._settings(1200, 3e-4, ema_decay=0.95, seed=3), LCM_FULL)
        copy_unet(student.unet, torch.float32).save_pretrained(folder / "model")
        _lcm_scheduler(teacher, LCM_FULL).save_pretrained(folder / "model")

    def lcm_xl(self) -> None:
        """An LCM-LoRA of the teacher in SDXL's layout, with an entry to serve it. Turbo goes on from it; it doesn't
        ship."""
        teacher, folder = self._open("sdxl"), self.out / "lcm-xl"
        settings = self._settings(1200, 5e-4, ema_decay=0.95, seed=3)
        self._lcm_lora(teacher, folder, TURBO_RANK, settings, LCM_XL)
        entry = lcm_lora_entry(teacher, teacher.default_size, folder, LCM_XL.solver_timesteps)
        save_table("mini-lcm-xl", entry, folder)

    def features(self) -> None:
        """A classifier of latents. Turbo's discriminator can look through it instead of through the teacher."""
        settings = self._settings(2000, 1e-3, save_every=500)
        accuracy = train_classifier(
            LatentCache.load(self.out / "latents"), self.vocabulary, self.out / "features", settings
        )
        print(f"of unseen pictures: things {accuracy.things:.1%}, backgrounds {accuracy.backgrounds:.1%}")

    def turbo(self) -> None:
        """Turbo as a LoRA of the teacher in SDXL's layout: a further whole network would be too large to ship."""
        teacher, start = self._open("sdxl"), self.out / "lcm-xl"
        for name, (steps, settings) in TURBO_RUNS.items():
            self._turbo_lora(teacher, start, self.out / name, steps, settings)
            start = self.out / name
        entry = turbo_lora_entry(teacher, teacher.default_size, start, TURBO.student_timesteps)
        save_table("mini-turbo", entry, start)

    def styles(self) -> None:
        """A style LoRA for the teacher in SD's layout for each program of `restyling`."""
        for number, (name, restyle) in enumerate(STYLES.items()):
            settings = self._settings(250, 2e-3, warmup=20, ema_decay=0.98, save_every=25, seed=4 + number)
            train_style(self._open("sd"), self.vocabulary, restyle, self.out / name, settings, self._scaled(6000))

    def export(self) -> None:
        """Everything that was made so far, in fp16, with cards. Raises TrainingError where that is nothing."""
        with shipment(self.bundled) as made:
            for stage, name in LORAS.items():
                if (self.out / stage / LORA_WEIGHT_NAME_SAFE).exists():
                    export_lora(self.out / stage, made / name)
            for stage, name in PIPELINES.items():
                if (self.out / stage / "model").exists():
                    export_pipeline(self.out / stage / "model", made / name)
            if (self.out / "lcm-full" / "model").exists():
                export_unet(self.out / "lcm-full" / "model", made / "mini-lcm-full")
            if (self.out / "autoencoder" / "taesd").exists():
                export_tiny(self.out / "autoencoder" / "taesd", made / "mini-taesd")
            if (made / "mini-sd").exists():
                save_reference(made / "mini-sd" / "reference", self.vocabulary, draw_sprites(self.vocabulary))
            if not any(made.iterdir()):
                raise TrainingError(f"{self.out} has nothing to export: run the stages before it, or give --out")

    def _train_teacher(self, networks: Networks, folder: Path, tokenizer: Path, steps: int, rate: float) -> None:
        # A tokenizer of its own: one that was called saves the padding of that call.
        pipeline = networks.pipeline(self._vae, CLIPTokenizer.from_pretrained(tokenizer))
        data = self._data(CLIPTokenizer.from_pretrained(tokenizer))
        settings = self._settings(steps, rate, warmup=200, seed=1)
        train_jointly(networks, data, folder, settings, lambda: pipeline.save_pretrained(folder / "model"))

    @cached_property
    def _vae(self) -> AutoencoderKL:
        vae: AutoencoderKL = AutoencoderKL.from_pretrained(self.out / "autoencoder" / "vae")
        return vae

    def _data(self, tokenizer: CLIPTokenizer) -> CaptionedLatents:
        return CaptionedLatents(LatentCache.load(self.out / "latents"), self.vocabulary, tokenizer, BATCH)

    def _open(self, layout: Layout) -> Teacher:
        return open_teacher(str(self.out / TEACHERS[layout] / "model"), {})

    def _turbo_lora(self, teacher: Teacher, start: Path, folder: Path, steps: int, settings: add.AddSettings) -> None:
        scheduler, encoders = add.build_scheduler(teacher), teacher.load_encoders(CPU)
        torch.manual_seed(4)
        student = LoraStudent(teacher.load_unet(CPU, torch.float32), TURBO_RANK, start=start)
        with student.teacher() as frozen:
            features = TeacherFeatures(frozen, teacher.build_diffusion(CPU), Compute())
        distiller = add.AddDistiller(
            student,
            features,
            teacher.build_diffusion(CPU),
            add.student_timesteps(scheduler, settings.student_timesteps),
            PaintedBatches(self._data(encoders.tokenizers[0]), encoders),
            folder,
            self._settings(steps, 3e-4, ema_decay=0.98, save_every=200, seed=4),
            settings,
        )

        def save() -> None:
            save_lora(student.unet, folder)
            scheduler.save_pretrained(folder)

        distiller.distill(save)

    def _lcm_lora(self, teacher: Teacher, folder: Path, rank: int, settings: TrainSettings, lcm: LcmSettings) -> None:
        torch.manual_seed(settings.seed)
        student = LoraStudent(teacher.load_unet(CPU, torch.float32), rank)
        self._distill(teacher, student, folder, settings, lcm)
        save_lora(student.unet, folder)
        _lcm_scheduler(teacher, lcm).save_pretrained(folder)

    def _distill(
        self,
        teacher: Teacher,
        student: LoraStudent | FullStudent,
        folder: Path,
        settings: TrainSettings,
        lcm: LcmSettings,
    ) -> None:
        """At the end the student has its averaged weights."""
        encoders = teacher.load_encoders(CPU)
        batches = PaintedBatches(self._data(encoders.tokenizers[0]), encoders)
        distiller = Distiller(student, teacher.build_diffusion(CPU), batches, folder, settings, lcm)
        distiller.distill(lambda: None)
        distiller.trainer.keep_average()

    def _settings(self, steps: int, rate: float, **others: Any) -> TrainSettings:
        return TrainSettings(self._scaled(steps), rate, **others)

    def _scaled(self, number: int) -> int:
        return max(1, round(number * self.share))


def _lcm_scheduler(teacher: Teacher, lcm: LcmSettings) -> Any:
    return teacher.build_scheduler(LCMScheduler, original_inference_steps=lcm.solver_timesteps)
