"""Folders of the real architectures, made small: true layer types and config keys, tiny widths, random weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
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
CONSISTENCY_SCHEDULERS = {  # of the paper, and of diffusers where the paper gives no timesteps
    "multistep": SchedulerSpec(class_name="CMStochasticIterativeScheduler", timesteps={2: [22, 0]}),
    "even": SchedulerSpec(class_name="CMStochasticIterativeScheduler"),
}
TURBO_SCHEDULER: dict[str, Any] = {  # what the folders of SDXL-Turbo and SD-Turbo say of theirs
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}
NO_GUIDANCE: dict[str, Any] = {"guidance": "none", "guidance_scale": Range(default=0, min=0, max=0)}
EMBEDDED: dict[str, Any] = {"guidance": "embedded", "guidance_scale": Range(default=8.5, min=3, max=13)}


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


def make_sd_turbo_folder(folder: Path) -> None:
    """Stable Diffusion 2.1 as SD-Turbo has it: OpenCLIP's text encoder and padding, attention heads of one width in
    linear projections, a scheduler with trailing timesteps."""
    torch.manual_seed(5)
    StableDiffusionPipeline(
        text_encoder=CLIPTextModel(_text_config(hidden_size=32, hidden_act="gelu", projection_dim=16, pad_token_id=2)),
        tokenizer=_make_tokenizer(pad_token="!"),
        unet=_make_unet(cross_attention_dim=32, attention_head_dim=(2, 4), use_linear_projection=True),
        vae=_make_vae(scaling_factor=0.5),
        scheduler=EulerDiscreteScheduler(**TURBO_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def make_sdxl_folder(folder: Path, scheduler: Any = None, **unet: Any) -> None:
    """The same in SDXL's layout: two text encoders of different widths, a pooled embedding, time ids."""
    torch.manual_seed(3)
    StableDiffusionXLPipeline(
        text_encoder=CLIPTextModel(_text_config(hidden_size=32)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(hidden_size=48, projection_dim=24)),
        tokenizer=_make_tokenizer(),
        tokenizer_2=_make_tokenizer(),
        unet=_make_sdxl_unet(**unet),
        vae=_make_vae(scaling_factor=0.5),
        scheduler=scheduler or _make_scheduler(),
    ).save_pretrained(folder)


def make_lcm_sdxl_unet_folder(folder: Path) -> None:
    """A full LCM's UNet for SDXL, all that lcm-sdxl publishes."""
    torch.manual_seed(6)
    _make_sdxl_unet(time_cond_proj_dim=32).save_pretrained(folder)


def make_consistency_folder(folder: Path) -> None:
    """A ConsistencyModelPipeline folder of ImageNet's classes at 32x32, with the layers of cd_imagenet64_l2."""
    torch.manual_seed(7)
    unet = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        num_class_embeds=1000,
        block_out_channels=(32, 64),
        attention_head_dim=8,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=32,
        upsample_type="resnet",
        downsample_type="resnet",
    )
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0)
    ConsistencyModelPipeline(unet, scheduler).save_pretrained(folder)


def _text_config(hidden_size: int, **changes: Any) -> CLIPTextConfig:
    values: dict[str, Any] = {
        "vocab_size": 1000,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    return CLIPTextConfig(hidden_size=hidden_size, **(values | changes))


def _make_unet(**changes: Any) -> UNet2DConditionModel:
    values: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(values | changes))


def _make_sdxl_unet(**changes: Any) -> UNet2DConditionModel:
    return _make_unet(
        cross_attention_dim=32 + 48,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
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
    return small_spec(root, source=str(root / "lcm"), lora=None, **EMBEDDED)


def small_sd_turbo_spec(root: Path) -> ModelSpec:
    if not (root / "sd-turbo").exists():
        make_sd_turbo_folder(root / "sd-turbo")
    source = str(root / "sd-turbo")
    return small_spec(root, source=source, lora=None, default_scheduler="euler", **NO_GUIDANCE)


def small_sdxl_spec(root: Path, **changes: Any) -> ModelSpec:
    """SDXL's layout."""
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


def small_sdxl_lora_spec(root: Path) -> ModelSpec:
    """SDXL and an LCM-LoRA."""
    return small_sdxl_spec(root, lora=LoraSpec(source=str(root / "sdxl-lora")), default_scheduler="lcm")


def small_turbo_lora_spec(root: Path) -> ModelSpec:
    """SDXL and a LoRA that makes a Turbo of it."""
    lora = LoraSpec(source=str(root / "sdxl-lora"), scale=0.8)
    return small_sdxl_spec(root, lora=lora, default_scheduler="euler-ancestral", **NO_GUIDANCE)


def small_sdxl_turbo_spec(root: Path) -> ModelSpec:
    if not (root / "sdxl-turbo").exists():
        make_sdxl_folder(root / "sdxl-turbo", EulerAncestralDiscreteScheduler(**TURBO_SCHEDULER))
    schedulers = SCHEDULERS | {"euler-ancestral": SchedulerSpec(class_name="EulerAncestralDiscreteScheduler")}
    return small_sdxl_spec(root, source=str(root / "sdxl-turbo"), schedulers=schedulers, **NO_GUIDANCE)


def small_lcm_sdxl_spec(root: Path) -> ModelSpec:
    """SDXL with the UNet of a full LCM."""
    if not (root / "lcm-sdxl").exists():
        make_lcm_sdxl_unet_folder(root / "lcm-sdxl")
    return small_sdxl_spec(root, unet=str(root / "lcm-sdxl"), default_scheduler="lcm", **EMBEDDED)


def small_ssd_spec(root: Path) -> ModelSpec:
    """SSD-1B: SDXL with fewer transformer layers, other ones on the way up, and none in the middle; an LCM-LoRA."""
    if not (root / "ssd").exists():
        make_sdxl_folder(
            root / "ssd",
            block_out_channels=(16, 32, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2D",
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(1, 2, 4),
            transformer_layers_per_block=[1, [1], [2]],
            reverse_transformer_layers_per_block=[[1, 2], [1, 1], 1],
        )
        make_lora_folder(root / "ssd-lora", root / "ssd")
    lora = LoraSpec(source=str(root / "ssd-lora"))
    return small_sdxl_spec(root, source=str(root / "ssd"), lora=lora, default_scheduler="lcm")


def small_consistency_spec(root: Path, **changes: Any) -> ModelSpec:
    """Class-conditional, in pixels; one size, which its network was made for."""
    if not (root / "consistency").exists():
        make_consistency_folder(root / "consistency")
    values: dict[str, Any] = {
        "family": "consistency",
        "source": str(root / "consistency"),
        "classes": "imagenet",
        "tiny_vae": None,
        "lora": None,
        "schedulers": CONSISTENCY_SCHEDULERS,
        "default_scheduler": "multistep",
        "num_inference_steps": StepRange(default=2, min=1, max=4),
        "sizes": [(32, 32)],
    }
    return small_spec(root, **(values | NO_GUIDANCE | changes))


# Every family and variant that the catalog has, by what is special about it.
SMALL_SPECS: dict[str, Callable[[Path], ModelSpec]] = {
    "sd with an LCM-LoRA": small_spec,
    "full LCM of sd": small_lcm_spec,
    "sd turbo": small_sd_turbo_spec,
    "sdxl": small_sdxl_spec,
    "sdxl with an LCM-LoRA": small_sdxl_lora_spec,
    "full LCM of sdxl": small_lcm_sdxl_spec,
    "sdxl turbo": small_sdxl_turbo_spec,
    "sdxl with a Turbo LoRA": small_turbo_lora_spec,
    "ssd-1b with an LCM-LoRA": small_ssd_spec,
    "consistency": small_consistency_spec,
}


def _make_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizerFast:
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
        pad_token=pad_token,
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
