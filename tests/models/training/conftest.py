"""Tiny worlds for the training tests: drawn shapes only, so that no font is needed; and where small teachers lie."""

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from models.training.mini.autoencoder import fit_code
from models.training.mini.latents import encode_scenes
from models.training.mini.linear_code import LinearCode
from models.training.mini.teacher import CaptionedLatents
from models.training.mini.tokenizer import build_tokenizer
from models.training.mini.vocabulary import Vocabulary, load_vocabulary


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tests of a module share: teachers, pictures and what they are encoded to. None of them changes it."""
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="session")
def shapes() -> Vocabulary:
    return load_vocabulary().without_emoji()


@pytest.fixture(scope="session")
def tokenizer(shapes: Vocabulary) -> CLIPTokenizer:
    return build_tokenizer(shapes, num_captions=500, max_merges=200)


@pytest.fixture(scope="session")
def code(shapes: Vocabulary) -> LinearCode:
    return fit_code(shapes, count=100)


@pytest.fixture
def data(shapes: Vocabulary, code: LinearCode, tokenizer: CLIPTokenizer) -> CaptionedLatents:
    """Eight pictures that every batch draws from."""
    return CaptionedLatents(encode_scenes(shapes, code.encode, count=8, batch_size=8), shapes, tokenizer, batch_size=8)
