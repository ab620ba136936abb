"""The published architectures at full size with random weights, for machines that can't fetch the real ones.

The configs are those of the repositories' own folders. How long a network takes doesn't depend on what it has learned.
"""

from __future__ import annotations

import json
import weakref
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, Self

import diffusers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast

from benchmarks.prompts import endless_prompts
from models.catalog import ModelSpec, Range, SchedulerSpec, Size, StepRange
from models.loading import FAMILIES, settle

START, END = "<|startoftext|>", "<|endoftext|>"
START_ID, END_ID = 49406, 49407  # the end has the highest id: by that the text encoders find the pooled token
MAX_TOKENS = 77

SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
LCM = SchedulerSpec(class_name="LCMScheduler")
TURBO = SchedulerSpec(class_name="EulerAncestralDiscreteScheduler", config={"timestep_spacing": "trailing"})
CM = SchedulerSpec(class_name="CMStochasticIterativeScheduler")


@dataclass(frozen=True)
class Architecture:
    """What the folder of one model says, by the name of its catalog entry.

    The first text encoder has no projection, a second one has. A consistency model has a UNet alone.
    """

    name: str
    family: Literal["sd", "sdxl", "consistency"]
    unet: dict[str, Any]
    text_encoders: tuple[dict[str, Any], ...]
    scheduler: SchedulerSpec
    steps: int
    sizes: tuple[Size, ...]
    vae: dict[str, Any] | None
    tiny_vae: dict[str, Any] | None


SD_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "norm_num_groups": 32,
}
SDXL_UNET = SD_UNET | {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": MAX_TOKENS,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,  # as published; transformers then looks for the highest id
    "pad_token_id": 1,
}
OPENCLIP_BIG_G = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
OPENCLIP_H = CLIP_L | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
VAE = {
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
SDXL_VAE = VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": False}
TAESD = {
    "encoder_block_out_channels": (64, 64, 64, 64),
    "decoder_block_out_channels": (64, 64, 64, 64),
    "num_encoder_blocks": (1, 3, 3, 3),
    "num_decoder_blocks": (3, 3, 3, 1),
    "latent_channels": 4,
    "scaling_factor": 1.0,
}

SD15_UNET = SD_UNET | {"attention_head_dim": 8, "cross_attention_dim": 768}
SD21_UNET = SD_UNET | {
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SSD_1B_UNET = SDXL_UNET | {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": (1, (2, 2), (4, 4)),
    "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
}
EMBEDS_GUIDANCE = {"time_cond_proj_dim": 256}
CM_UNET = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 3,
    "block_out_channels": (192, 384, 576, 768),
    "down_block_types": ("ResnetDownsampleBlock2D",) + ("AttnDownBlock2D",) * 3,
    "up_block_types": ("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_head_dim": 64,
    "norm_num_groups": 32,
    "attn_norm_num_groups": 32,
    "resnet_time_scale_shift": "scale_shift",
    "num_class_embeds": 1000,
}

SD15 = Architecture(
    name="sd15-lcm",
    family="sd",
    unet=SD15_UNET,
    text_encoders=(CLIP_L,),
    scheduler=LCM,
    steps=4,
    sizes=((512, 512),),
    vae=VAE,
    tiny_vae=TAESD,
)
SDXL_TURBO = Architecture(
    name="sdxl-turbo",
    family="sdxl",
    unet=SDXL_UNET,
    text_encoders=(CLIP_L, OPENCLIP_BIG_G),
    scheduler=TURBO,
    steps=1,
    sizes=((512, 512), (1024, 1024)),
    vae=SDXL_VAE,
    tiny_vae=TAESD,
)
SDXL = replace(SDXL_TURBO, name="sdxl-lcm", scheduler=LCM, steps=4, sizes=((1024, 1024),))

ARCHITECTURES = (
    SDXL_TURBO,
    SD15,
    replace(SD15, name="sd-turbo", unet=SD21_UNET, text_encoders=(OPENCLIP_H,), scheduler=TURBO, steps=1),
    replace(SD15, name="dreamshaper-lcm-lora"),
    replace(SD15, name="lcm-dreamshaper-v7", unet=SD15_UNET | EMBEDS_GUIDANCE, sizes=((768, 768),)),
    SDXL,
    replace(SDXL, name="ssd-1b-lcm", unet=SSD_1B_UNET),
    replace(SDXL, name="lcm-sdxl", unet=SDXL_UNET | EMBEDS_GUIDANCE),
    replace(SDXL, name="sdxl-turbo-lora", scheduler=TURBO),
    Architecture(
        name="cm-imagenet64",
        family="consistency",
        unet=CM_UNET,
        text_encoders=(),
        scheduler=CM,
        steps=2,
        sizes=((64, 64),),
        vae=None,
        tiny_vae=None,
    ),
)
GPU_BENCHMARK = ("sdxl-turbo", "sd15-lcm", "sd-turbo")  # those whose parts benchmarks/gpu.py measures


def find_architecture(name: str) -> Architecture:
    """Of a catalog entry."""
    return next(architecture for architecture in ARCHITECTURES if architecture.name == name)


def shrink(architecture: Architecture) -> Architecture:
    """The same layers, narrow and fewer, for pictures of an eighth of the side: to try a program on a CPU."""
    if architecture.vae is None or architecture.tiny_vae is None:
        return replace(architecture, unet=_shrink_class_unet(architecture.unet))
    text_encoders = tuple(_shrink_text_encoder(config) for config in architecture.text_encoders)
    return replace(
        architecture,
        unet=_shrink_text_unet(architecture.unet, text_encoders[-1]["projection_dim"]),
        text_encoders=text_encoders,
        sizes=tuple((width // 8, height // 8) for width, height in architecture.sizes),
        vae=architecture.vae | {"block_out_channels": (16, 32, 64, 64), "norm_num_groups": 8},
        tiny_vae=architecture.tiny_vae
        | {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4},
    )


def _shrink_text_unet(unet: dict[str, Any], pooled_width: int) -> dict[str, Any]:
    heads = unet["attention_head_dim"]
    small = {
        "block_out_channels": tuple(width // 10 for width in unet["block_out_channels"]),
        "attention_head_dim": heads if isinstance(heads, int) else tuple(count // 5 for count in heads),
        "cross_attention_dim": unet["cross_attention_dim"] // 16,
        "norm_num_groups": 8,
    }
    if "addition_time_embed_dim" in unet:
        small["projection_class_embeddings_input_dim"] = 6 * unet["addition_time_embed_dim"] + pooled_width
    return unet | small


def _shrink_class_unet(unet: dict[str, Any]) -> dict[str, Any]:
    """Of a consistency model, whose pictures are small already."""
    widths = tuple(width // 12 for width in unet["block_out_channels"])
    return unet | {
        "block_out_channels": widths,
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "attn_norm_num_groups": 8,
    }


def _shrink_text_encoder(config: dict[str, Any]) -> dict[str, Any]:
    widths = ("hidden_size", "intermediate_size", "projection_dim")
    return config | {key: config[key] // 16 for key in widths} | {"num_hidden_layers": 2}


def make_spec(architecture: Architecture, size: Size, max_batch_size: int) -> ModelSpec:
    """A catalog entry for one picture size. Guidance is allowed where a guided request's two rows fit."""
    return ModelSpec(
        name=architecture.name,
        description="random weights",
        family=architecture.family,
        source="random weights",
        license="none",
        schedulers={"default": architecture.scheduler},
        default_scheduler="default",
        num_inference_steps=StepRange(default=architecture.steps, min=1, max=8),
        guidance_scale=Range(default=0, min=0, max=2 if max_batch_size > 1 else 1),
        sizes=[size],
        warm_sizes=[size],
        max_batch_size=max_batch_size,
        max_num_images=1,
    )


@dataclass(frozen=True)
class Parts:
    """diffusers' pipeline and the tiny decoder, as models.loading would have loaded them."""

    pipe: Any
    tiny_vae: Any

    @property
    def networks(self) -> dict[str, nn.Module]:
        """By the names that tables call them."""
        names = {"text encoder": "text_encoder", "text encoder 2": "text_encoder_2", "UNet": "unet", "VAE": "vae"}
        networks: dict[str, Any] = {name: getattr(self.pipe, part, None) for name, part in names.items()}
        networks["tiny VAE"] = self.tiny_vae
        for name in ("VAE", "tiny VAE"):
            networks[f"{name} decoder"] = getattr(networks[name], "decoder", None)
        return {name: network for name, network in networks.items() if network is not None}

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        whole = [network for name, network in self.networks.items() if not name.endswith(" decoder")]
        return sum(tensor.numel() * tensor.element_size() for network in whole for tensor in network.parameters())


def build_parts(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> Parts:
    """All networks, built on `device` itself. On the meta device they have shapes and no memory."""
    torch.manual_seed(0)
    with torch.device(device):
        networks = _make_networks(architecture)
    for network in networks.values():
        settle(_randomise(network).to(dtype), device)
    tiny_vae = networks.pop("tiny_vae", None)
    return Parts(_make_pipe(architecture, networks), tiny_vae)


def _make_networks(architecture: Architecture) -> dict[str, nn.Module]:
    """By diffusers' names, and the tiny VAE."""
    if architecture.vae is None or architecture.tiny_vae is None:
        return {"unet": diffusers.UNet2DModel(**architecture.unet)}
    text_classes = (CLIPTextModel, CLIPTextModelWithProjection)
    names = ("text_encoder", "text_encoder_2")
    encoders = zip(names, text_classes, architecture.text_encoders, strict=False)
    return {
        "unet": diffusers.UNet2DConditionModel(**architecture.unet),
        "vae": diffusers.AutoencoderKL(**architecture.vae),
        "tiny_vae": diffusers.AutoencoderTiny(**architecture.tiny_vae),
        **{name: text_class(CLIPTextConfig(**config)) for name, text_class, config in encoders},
    }


def _make_pipe(architecture: Architecture, networks: dict[str, nn.Module]) -> Any:
    scheduler_class: Any = getattr(diffusers, architecture.scheduler.class_name)
    if architecture.family == "consistency":
        return diffusers.ConsistencyModelPipeline(**networks, scheduler=scheduler_class())
    family = FAMILIES[architecture.family]
    scheduler = scheduler_class.from_config(SCHEDULE, **architecture.scheduler.config)
    tokenizers = dict(zip(("tokenizer", "tokenizer_2"), map(make_tokenizer, (END, "!")), strict=True))
    used = [name.replace("text_encoder", "tokenizer") for name in networks if name.startswith("text_encoder")]
    own = {"feature_extractor": None, **family.arguments, **{name: tokenizers[name] for name in used}}
    return family.pipeline_class(**networks, scheduler=scheduler, **own)


def _randomise(network: nn.Module) -> nn.Module:
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            _initialise(layer)
    return network


def _initialise(layer: nn.Linear | nn.Conv2d) -> None:
    """Outputs as wide as inputs, so that activations fit into fp16 through all layers."""
    std = layer.weight[0].numel() ** -0.5
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def make_tokenizer(pad_token: str) -> CLIPTokenizerFast:
    """Byte pairs learned from the benchmarks' prompts; the special tokens have CLIP's ids."""
    letters = [chr(code) for code in range(33, 127)]
    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learned.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    learned.train_from_iterator([*islice(endless_prompts(seed=0), 500), *letters], trainer)
    model = json.loads(learned.to_str())["model"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=model["vocab"] | {START: START_ID, END: END_ID},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token=END,
            end_of_word_suffix="</w>",
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, START_ID), (END, END_ID)]
    )
    return CLIPTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=pad_token,
        model_max_length=MAX_TOKENS,
    )


@dataclass(frozen=True)
class Attention:
    """One shape of attention: query and key are "b heads tokens width"."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    is_causal: bool
    has_mask: bool


class Counter:
    """What calls on the meta device would cost a device, operation by operation.

    `kernels` has the FLOPs and the bytes read and written of each. One operation is about one kernel in eager mode.
    Count outside of `torch.inference_mode`, which hides the parts of composite operations.
    """

    def __init__(self) -> None:
        self.kernels: list[tuple[int, int]] = []
        self.attentions: dict[Attention, int] = {}
        self._modes = ExitStack()

    def __enter__(self) -> Self:
        self._modes.enter_context(torch.no_grad())
        self._modes.enter_context(_Operations(self))
        self._modes.enter_context(_Attentions(self))
        return self

    def __exit__(self, *details: object) -> None:
        self._modes.close()

    def add(self, flops: int, *touched: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(touched) if isinstance(leaf, Tensor)]
        self.kernels.append((flops, sum(tensor.numel() * tensor.element_size() for tensor in tensors)))


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh")

    def __init__(self, counter: Counter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if not func.is_view and packet.__name__ not in self.FREE:
            count = flop_registry.get(packet)
            flops = 0 if count is None else count(*args, **(kwargs or {}), out_val=output)
            self._counter.add(flops, args, kwargs, output)
        return output


class _Attentions(TorchFunctionMode):
    """Attention as the one kernel that it is on a device; the meta device would take it apart."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **named: Any
    ) -> Tensor:
        attention = Attention(
            tuple(query.shape), tuple(key.shape), bool(named.get("is_causal", False)), attn_mask is not None
        )
        self._counter.attentions[attention] = self._counter.attentions.get(attention, 0) + 1
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        num_products = query.shape[:-1].numel() * key.shape[-2]
        flops = 2 * num_products * (query.shape[-1] + value.shape[-1])
        self._counter.add(flops, query, key, value, attn_mask, output)
        return output


class Peak:
    """The most bytes that tensors made inside it take at once, on the meta device too: `num_bytes`.

    Attention counts as one kernel, and kernels' own workspaces don't count. Not inside `torch.inference_mode`. With
    `is_training` gradients are followed, and attention is the caller's to count.
    """

    def __init__(self, is_training: bool = False) -> None:
        self.num_bytes = self._live = 0
        self._is_training = is_training
        self._modes = ExitStack()

    def __enter__(self) -> Self:
        if not self._is_training:
            self._modes.enter_context(torch.no_grad())
        self._modes.enter_context(_Allocations(self))
        if not self._is_training:
            self._modes.enter_context(_Attentions(Counter()))
        return self

    def __exit__(self, *details: object) -> None:
        self._modes.close()

    def hold(self, storage: torch.UntypedStorage) -> None:
        self._live += storage.nbytes()
        self.num_bytes = max(self.num_bytes, self._live)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, num_bytes: int) -> None:
        self._live -= num_bytes


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, peak: Peak) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._peak = peak
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(output):
            if storage._cdata not in given and storage not in self._known:
                self._known[storage] = True
                self._peak.hold(storage)
        return output


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
