import random

import numpy as np
from PIL import Image

from models.training.mini.captions import Captioner, plain_caption
from models.training.mini.dataset import STILL, Composer, Poses, Scene, SceneSampler
from models.training.mini.recognizer import ColorNamer, Recognizer, background_noise
from models.training.mini.sprites import draw_shape, tint
from models.training.mini.vocabulary import Vocabulary, load_vocabulary


def test_every_name_means_one_thing() -> None:
    names = [name for thing in load_vocabulary().things for name in thing.names]
    assert len(names) == len(set(names))


def test_only_what_has_no_colour_of_its_own_is_asked_for_in_one() -> None:
    vocabulary = load_vocabulary()
    assert vocabulary.can_tint(vocabulary.find("dog"))
    assert not any(vocabulary.can_tint(vocabulary.find(name)) for name in ("red apple", "orange", "blue star"))
    assert {"red", "brown"} <= {vocabulary.colors[tint].name for tint in vocabulary.tints}
    assert not {"black", "gray", "white"} & {vocabulary.colors[tint].name for tint in vocabulary.tints}


def test_the_vocabulary_is_large_and_has_twelve_colors() -> None:
    vocabulary = load_vocabulary()
    assert 160 <= len(vocabulary.emoji) <= 180
    assert len(vocabulary.colors) == 12
    assert vocabulary.find("puppy") == vocabulary.find("dog")


def test_a_named_background_is_painted_plainly(shapes: Vocabulary) -> None:
    blue = [color.name for color in shapes.colors].index("blue")
    scene = Scene((shapes.find("red circle"),), background=blue)
    picture = Composer(shapes).compose(scene, random.Random(0))
    assert picture.shape == (64, 64, 3)
    assert tuple(picture[0, 0]) == shapes.colors[blue].rgb
    assert background_noise(picture) < 1


def test_the_same_seed_paints_the_same_picture_and_another_seed_another(shapes: Vocabulary) -> None:
    composer, scene = Composer(shapes), Scene((0,), background=3)
    first, again, other = (composer.compose(scene, random.Random(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_shape_never_vanishes_on_its_own_color(shapes: Vocabulary) -> None:
    sampler, rng = SceneSampler(shapes), random.Random(0)
    for scene in (sampler.sample(rng) for _ in range(500)):
        assert scene.background not in {shapes.things[thing].color for thing in scene.things}


def test_captions_name_what_is_there(shapes: Vocabulary) -> None:
    sampler, captioner, rng = SceneSampler(shapes), Captioner(shapes), random.Random(0)
    for scene in (sampler.sample(rng) for _ in range(200)):
        caption = captioner.caption(scene, rng)
        assert all(any(name in caption for name in shapes.things[thing].names) for thing in scene.things)
        assert "{" not in caption


def test_plain_captions_read_well(shapes: Vocabulary) -> None:
    orange = [color.name for color in shapes.colors].index("orange")
    star, ring = shapes.find("blue star"), shapes.find("orange ring")
    assert plain_caption(Scene((star,), background=orange), shapes) == "a blue star on an orange background"
    assert plain_caption(Scene((star, ring), "column"), shapes) == "a blue star above an orange ring"


def test_the_recognizer_knows_painted_scenes(shapes: Vocabulary) -> None:
    composer, sampler, rng = Composer(shapes), SceneSampler(shapes, pairs=0), random.Random(4)
    recognizer = Recognizer(composer.sprites)
    namer = ColorNamer([color.rgb for color in shapes.colors])
    scenes = [scene for scene in (sampler.sample(rng) for _ in range(80)) if scene.background is not None]
    pictures = [composer.compose(scene, rng) for scene in scenes]
    right = [recognizer.single(picture) == scene.things[0] for scene, picture in zip(scenes, pictures, strict=True)]
    assert sum(right) >= 0.9 * len(right)
    assert all(namer.name(picture) == scene.background for scene, picture in zip(scenes, pictures, strict=True))


def test_a_tint_keeps_the_outline_and_takes_the_colour() -> None:
    sprite = draw_shape("heart", (142, 144, 150))
    blue = tint(sprite, (48, 98, 208))
    assert blue.getchannel("A").tobytes() == sprite.getchannel("A").tobytes()
    assert blue.getpixel((64, 64)) == (48, 98, 208, 255)


def test_a_thing_moves_by_whole_latents(shapes: Vocabulary) -> None:
    """Nine places are nine pictures."""
    scene = Scene((shapes.find("red heart"),), background=3)
    middle = Composer(shapes, poses=STILL).compose(scene, random.Random(0))
    moved = {np.roll(middle, (y, x), axis=(0, 1)).tobytes() for x in (-4, 0, 4) for y in (-4, 0, 4)}
    composer = Composer(shapes, poses=Poses(reach=1, mirrored=0.0))
    assert {composer.compose(scene, random.Random(seed)).tobytes() for seed in range(200)} == moved


def test_half_of_the_things_are_mirrored() -> None:
    vocabulary = load_vocabulary().without_emoji()
    arrow = [[Image.new("RGBA", (64, 64), (0, 0, 0, 0))] for _ in vocabulary.things]
    arrow[0][0].paste((255, 255, 255, 255), (0, 0, 32, 64))
    composer, scene = Composer(vocabulary, arrow), Scene((0,), background=9)
    pictures = [composer.compose(scene, random.Random(seed)).astype(int) for seed in range(100)]
    assert 30 < sum(picture[:, :28].sum() > picture[:, 36:].sum() for picture in pictures) < 70
