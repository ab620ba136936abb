"""The classifier whose features judge: it learns, goes on exactly, and is read by what distils."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.networks import LoadError
from models.training.errors import FeaturesError
from models.training.features import LatentClassifier, load_classifier
from models.training.mini.dataset import Scene
from models.training.mini.features import UNNAMED, ClassifierTraining, Labels, build_classifier, measure, split
from models.training.mini.latents import LatentCache
from models.training.mini.teacher import CaptionedLatents
from models.training.mini.vocabulary import Vocabulary
from models.training.teachers import Conditions
from models.training.trainer import TrainSettings
from tests.training_data import EXACT, assert_lower, assert_same_tensors, settings

NOTHING = Conditions(torch.zeros(8, 1, 1))


@pytest.fixture
def cache(data: CaptionedLatents) -> LatentCache:
    return data.cache


def small_classifier(vocabulary: Vocabulary) -> LatentClassifier:
    torch.manual_seed(0)
    return build_classifier(vocabulary, channels=(16, 32))


def make_training(cache: LatentCache, vocabulary: Vocabulary, out: Path, plan: TrainSettings) -> ClassifierTraining:
    return ClassifierTraining(small_classifier(vocabulary), cache, vocabulary, out, plan, 8, EXACT)


def test_labels_are_what_the_scene_has(shapes: Vocabulary) -> None:
    labels = Labels.of([Scene((3, 5), background=2), Scene((4,))], shapes)
    assert labels.things.nonzero().tolist() == [[0, 3], [0, 5], [1, 4]]
    assert labels.backgrounds.tolist() == [2, UNNAMED]


def test_it_learns_eight_pictures(shapes: Vocabulary, cache: LatentCache, tmp_path: Path) -> None:
    before = measure(small_classifier(shapes), cache, shapes, EXACT)
    training = make_training(cache, shapes, tmp_path, settings(60, 3e-3))
    training.train()
    assert_lower(tmp_path / "training", 0.3)
    after = measure(training.trainer.keep_average(), cache, shapes, EXACT)
    assert before.things < 0.5
    assert after.things > 0.8
    assert after.backgrounds > 0.8


def test_a_resumed_run_equals_an_unbroken_one(shapes: Vocabulary, cache: LatentCache, tmp_path: Path) -> None:
    make_training(cache, shapes, tmp_path / "unbroken", settings(5)).train()
    for until in (2, None):
        make_training(cache, shapes, tmp_path / "broken", settings(5)).train(until)
    one, other = (LatentClassifier.from_pretrained(tmp_path / name).state_dict() for name in ("unbroken", "broken"))
    assert_same_tensors(one, other)


def test_its_maps_are_features_that_let_gradients_through(
    shapes: Vocabulary, cache: LatentCache, tmp_path: Path
) -> None:
    small_classifier(shapes).save_pretrained(tmp_path)
    features = load_classifier(tmp_path, EXACT)
    latents = cache.latents.float().requires_grad_(True)
    maps = features.extract(latents, features.draw_levels(8), NOTHING)
    assert [tuple(each.shape) for each in maps] == [(8, 16, 16, 16), (8, 32, 8, 8)]
    assert features.channels == (16, 32)
    assert torch.equal(features.summarize(latents, NOTHING), maps[-1].detach().mean((2, 3)))
    maps[-1].sum().backward()  # type: ignore[no-untyped-call]
    assert latents.grad is not None
    assert bool(latents.grad.any())
    assert all(weight.grad is None for weight in features.network.parameters())


def test_other_weights_are_other_features(shapes: Vocabulary, tmp_path: Path) -> None:
    network = small_classifier(shapes)
    network.save_pretrained(tmp_path / "one")
    network.labels.weight.data += 1
    network.save_pretrained(tmp_path / "other")
    one, other = (load_classifier(tmp_path / name, EXACT).identity for name in ("one", "other"))
    assert one != other


def test_what_is_no_classifier_is_refused(shapes: Vocabulary, tmp_path: Path) -> None:
    with pytest.raises(FeaturesError, match=r"--features .*: 'teacher' or the folder of a LatentClassifier is needed"):
        load_classifier(tmp_path, EXACT)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(FeaturesError, match="a LatentClassifier is needed there, it has AutoencoderKL"):
        load_classifier(tmp_path, EXACT)
    LatentClassifier(2, 2, in_channels=16, channels=(16,)).save_pretrained(tmp_path)
    with pytest.raises(FeaturesError, match="takes 16 channels, not 4"):
        load_classifier(tmp_path, EXACT)
    small_classifier(shapes).save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(LoadError, match="is not a sound safetensors file"):
        load_classifier(tmp_path, EXACT)


def test_some_are_kept_to_measure_on(cache: LatentCache) -> None:
    seen, held_out = split(cache, 0.25)
    assert (len(seen.scenes), len(held_out.scenes)) == (6, 2)
    assert seen.scenes + held_out.scenes == cache.scenes
    assert torch.equal(torch.cat([seen.latents, held_out.latents]), cache.latents)
