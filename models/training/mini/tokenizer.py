"""The tokenizer: CLIP's own format, with a small byte-pair vocabulary learnt from the captions."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from models.training.mini.captions import Captioner
from models.training.mini.dataset import SceneSampler
from models.training.mini.vocabulary import Vocabulary

MAX_TOKENS = 24
WORD_END = "</w>"
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def build_tokenizer(vocabulary: Vocabulary, num_captions: int = 20_000, max_merges: int = 1024) -> CLIPTokenizer:
    """Learn the merges on random captions. Any text can be encoded: every byte has its tokens."""
    merges = _learn_merges(_captions(vocabulary, num_captions), max_merges)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + WORD_END for byte in alphabet), *("".join(pair) for pair in merges), *SPECIAL]
    ids = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=MAX_TOKENS)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write `tokenizer.json`, and the two files that transformers before version 5 reads."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def _captions(vocabulary: Vocabulary, count: int) -> Iterable[str]:
    rng = random.Random(0)
    sampler, captioner = SceneSampler(vocabulary), Captioner(vocabulary)
    return (captioner.caption(sampler.sample(rng), rng) for _ in range(count))


def _learn_merges(captions: Iterable[str], max_merges: int) -> list[tuple[str, str]]:
    """The merges of a byte-pair model, in order: each token beyond single letters is the join of two earlier ones."""
    model = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    model.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=max_merges + 2 * 256, end_of_word_suffix=WORD_END, min_frequency=2, show_progress=False
    )
    model.train_from_iterator(captions, trainer)
    return [(left, right) for left, right in json.loads(model.to_str())["model"]["merges"]]
