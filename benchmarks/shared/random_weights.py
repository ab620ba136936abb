"""diffusers' pipelines of the published architectures with random weights, for machines that can't fetch the real ones.

How long a network takes doesn't depend on what it has learned.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from typing import Any

import diffusers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast

from benchmarks.shared.architectures import MAX_TOKENS, SCHEDULE, Architecture
from benchmarks.shared.prompts import endless_prompts
from models.loading import FAMILIES, settle

START, END = "<|startoftext|>", "<|endoftext|>"
START_ID, END_ID = 49406, 49407  # the end has the highest id: by that the text encoders find the pooled token


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
