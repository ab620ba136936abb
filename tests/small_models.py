"""Folders of the real architectures, made small: true layer types and config keys, tiny widths, random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizerFast,
)

from models.catalog import LoraSpec, ModelSpec, Range, SchedulerSpec, StepRange

SCHEDULERS = {
    "lcm": SchedulerSpec(class_name="LCMScheduler"),
    "ddim": SchedulerSpec(class_name="DDIMScheduler"),
    "euler": SchedulerSpec(class_name="EulerDiscreteScheduler"),
    "euler-ancestral": SchedulerSpec(
        class_name="EulerAncestralDiscreteScheduler", config={"timestep_spacing": "trailing"}
    ),
    "dpm-solver": SchedulerSpec(class_name="DPMSolverMultistepScheduler"),
    "tcd": SchedulerSpec(class_name="TCDScheduler"),
}


def make_sd_folder(folder: Path, time_cond_proj_dim: int | None = None) -> None:
    """A StableDiffusionPipeline folder that draws 32x32 noise-like pictures, different for each prompt and seed.

    With `time_cond_proj_dim` its UNet embeds the guidance scale, as that of a full LCM does.
    """
    torch.manual_seed(0)
    StableDiffusionPipeline(
        text_encoder=CLIPTextModel(_text_config(hidden_size=32)),
        tokenizer=_make_tokenizer(),
        unet=_make_unet(cross_attention_dim=32, time_cond_proj_dim=time_cond_proj_dim),
        vae=_make_vae(scaling_factor=0.5),
        scheduler=_make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def make_sdxl_folder(folder: Path) -> None:
    """The same in SDXL's layout: two text encoders of different widths, a pooled embedding, time ids."""
    torch.manual_seed(3)
    unet = _make_unet(
        cross_attention_dim=32 + 48,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    StableDiffusionXLPipeline(
        text_encoder=CLIPTextModel(_text_config(hidden_size=32)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(hidden_size=48, projection_dim=24)),
        tokenizer=_make_tokenizer(),
        tokenizer_2=_make_tokenizer(),
        unet=unet,
        vae=_make_vae(scaling_factor=0.5),
        scheduler=_make_scheduler(),
    ).save_pretrained(folder)


def _text_config(hidden_size: int, **changes: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=1000,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **changes,
    )


def _make_unet(**changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        **changes,
    )


def _make_vae(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=scaling_factor,
    )


def _make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )


def make_tiny_vae_folder(folder: Path) -> None:
    torch.manual_seed(1)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
        scaling_factor=1.0,
    ).save_pretrained(folder)


def make_lora_folder(folder: Path, base_folder: Path) -> None:
    """A LoRA over the UNet's attention, with weights large enough to change every picture."""
    unet = UNet2DConditionModel.from_pretrained(base_folder / "unet")
    torch.manual_seed(2)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))


def make_safety_folder(folder: Path, concept_threshold: float, care_threshold: float = 2.0) -> None:
    """A StableDiffusionSafetyChecker of random weights with its feature extractor.

    Thresholds are of cosines: with 2 it blocks nothing, with -2 everything.
    """
    torch.manual_seed(4)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16))
    for name in ("concept_embeds", "special_care_embeds"):
        torch.nn.init.normal_(getattr(checker, name))
    checker.concept_embeds_weights.fill_(concept_threshold)
    checker.special_care_embeds_weights.fill_(care_threshold)
    checker.save_pretrained(folder / "safety_checker")
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder / "feature_extractor")


def small_spec(root: Path, **changes: Any) -> ModelSpec:
    """A catalog entry over folders that are made under `root` when they aren't there yet."""
    if not (root / "sd").exists():
        make_sd_folder(root / "sd")
        make_tiny_vae_folder(root / "tiny")
        make_lora_folder(root / "lora", root / "sd")
    values: dict[str, Any] = {
        "name": "small",
        "description": "random weights",
        "family": "sd",
        "source": str(root / "sd"),
        "license": "Apache-2.0",
        "tiny_vae": str(root / "tiny"),
        "lora": LoraSpec(source=str(root / "lora")),
        "schedulers": SCHEDULERS,
        "default_scheduler": "lcm",
        "num_inference_steps": StepRange(default=4, min=1, max=20),
        "guidance_scale": Range(default=0, min=0, max=5),
        "sizes": [(32, 32), (48, 32)],
        "warm_sizes": [(32, 32)],
        "max_batch_size": 16,
    }
    return ModelSpec(**(values | changes))


def small_lcm_spec(root: Path) -> ModelSpec:
    """A full LCM: no LoRA, and the guidance scale goes into its network."""
    if not (root / "lcm").exists():
        make_sd_folder(root / "lcm", time_cond_proj_dim=32)
    guidance = Range(default=8.5, min=3, max=13)
    return small_spec(root, source=str(root / "lcm"), lora=None, guidance_scale=guidance, guidance="embedded")


def small_sdxl_spec(root: Path, **changes: Any) -> ModelSpec:
    """SDXL's layout with the scheduler of SDXL-Turbo as default."""
    if not (root / "sdxl").exists():
        make_sdxl_folder(root / "sdxl")
        make_lora_folder(root / "sdxl-lora", root / "sdxl")
    values: dict[str, Any] = {
        "family": "sdxl",
        "source": str(root / "sdxl"),
        "lora": None,
        "default_scheduler": "euler-ancestral",
    }
    return small_spec(root, **(values | changes))


def _make_tokenizer() -> CLIPTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<|startoftext|>", "<|endoftext|>"]
    letters = [chr(code) for code in range(32, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=letters, end_of_word_suffix="</w>"
    )
    tokenizer.train_from_iterator(["a red apple on a blue background", "one two three four", *letters], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[(special[0], 0), (special[1], 1)]
    )
    return CLIPTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        unk_token=special[1],
        pad_token=special[1],
        model_max_length=16,
    )


def write_small_catalog(root: Path, names: Sequence[str] = ("small",)) -> Path:
    """A catalog file whose entries are all `small_spec` without its LoRA, with the 50 steps that LCM can do."""
    changes: dict[str, Any] = {"lora": None, "num_inference_steps": StepRange(default=4, min=1, max=50)}
    specs = [small_spec(root, name=name, max_batch_size=8, **changes) for name in names]
    return write_catalog(root / "catalog.toml", specs)


def write_catalog(path: Path, specs: Sequence[ModelSpec]) -> Path:
    """A catalog file that `load_catalog` reads back as the very same specs, their style LoRAs included."""
    tables = {spec.name: spec.model_dump(mode="json", exclude={"name", "loras"}) for spec in specs}
    loras = {f"loras.{name}": lora for spec in specs for name, lora in spec.loras.items()}
    tables |= {table: lora.model_dump(mode="json", exclude={"name"}) for table, lora in loras.items()}
    path.write_text("\n".join(f"[{name}]\n{_toml_lines(table)}" for name, table in tables.items()), encoding="utf-8")
    return path


def _toml_lines(table: Mapping[str, Any]) -> str:
    return "".join(f"{json.dumps(key)} = {_toml(value)}\n" for key, value in table.items() if value is not None)


def _toml(value: Any) -> str:
    """Texts, numbers and lists of them look as in JSON."""
    if isinstance(value, Mapping):
        pairs = (f"{json.dumps(key)} = {_toml(one)}" for key, one in value.items() if one is not None)
        return f"{{ {', '.join(pairs)} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)
