"""The held-out prompts, and the judge: right on what was painted, wrong on anything else."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from models.training.mini.dataset import Composer, Pixels, Scene, SceneSampler, is_held_out
from models.training.mini.judging import Case, CaseMaker, Judge, check_reference, wilson
from models.training.mini.reference import Reference, load_reference, save_reference
from models.training.mini.sprites import draw_shape, draw_sprites
from models.training.mini.vocabulary import Thing, Vocabulary

World = tuple[Vocabulary, list[list[Image.Image]]]
GRAY = (142, 144, 150)


@pytest.fixture(scope="module")
def world(shapes: Vocabulary) -> World:
    """Shapes, and eight with a white eye that pass for emoji; one of them has two drawings."""
    kinds = ["ring", "plus", "heart", "hexagon", "diamond", "triangle", "star", "square"]
    emoji = tuple(Thing((f"tin {kind}",), glyphs=(kind,)) for kind in kinds)
    drawings = [[with_eye(draw_shape(kind, GRAY))] for kind in kinds]
    drawings[0].append(with_eye(draw_shape("circle", GRAY)))
    vocabulary = Vocabulary(shapes.colors, emoji + shapes.things)
    return vocabulary, drawings + draw_sprites(shapes)


@pytest.fixture(scope="module")
def cases(world: World) -> list[Case]:
    return CaseMaker(*world).cases(40)


def with_eye(sprite: Image.Image) -> Image.Image:
    eye = draw_shape("circle", (250, 250, 250)).resize((60, 60))
    sprite.alpha_composite(eye, (34, 40))
    return sprite


def paint(world: World, scene: Scene) -> Pixels:
    return Composer(*world).compose(scene, random.Random(3))


def test_no_training_scene_is_of_a_held_out_combination(world: World) -> None:
    vocabulary, rng = world[0], random.Random(0)
    sampler = SceneSampler(vocabulary)
    assert not any(is_held_out(sampler.sample(rng), vocabulary) for _ in range(400))
    assert 0.03 < sum(is_held_out(sampler.any_scene(rng), vocabulary) for _ in range(1000)) / 1000 < 0.3


def test_every_prompt_is_held_out_and_asks_for_a_background(cases: list[Case]) -> None:
    assert {case.kind for case in cases} == {"object", "shape", "tinted", "pair"}
    assert all(case.scene.background is not None for case in cases)
    assert len({case.seed for case in cases}) == len(cases)


def test_prompts_are_held_out_and_the_same_each_time(world: World, cases: list[Case]) -> None:
    assert all(is_held_out(case.scene, world[0]) for case in cases)
    assert CaseMaker(*world).cases(40) == cases


def test_the_judge_finds_painted_pictures_right(world: World, cases: list[Case]) -> None:
    judge = Judge(*world)
    verdicts = [(case, judge.judge(case, paint(world, case.scene))) for case in cases]
    assert all(verdict.background for _, verdict in verdicts)
    for kind in ("object", "shape", "tinted", "pair"):
        right = [verdict.things for case, verdict in verdicts if case.kind == kind]
        assert sum(right) >= 0.8 * len(right), kind


def test_the_judge_finds_other_pictures_wrong(world: World, cases: list[Case]) -> None:
    judge = Judge(*world)
    for case in cases:
        ground = next(color for color in range(12) if color != case.scene.background)
        assert not judge.judge(case, paint(world, replace(case.scene, background=ground))).background
    tinted = next(case for case in cases if case.kind == "tinted")
    assert not judge.judge(tinted, paint(world, replace(tinted.scene, tints=()))).things
    pair = next(case for case in cases if case.kind == "pair" and case.scene.things[0] != case.scene.things[1])
    assert not judge.judge(pair, paint(world, replace(pair.scene, things=pair.scene.things[::-1]))).things


def test_drawings_come_back_from_the_shipped_sheet(world: World, tmp_path: Path) -> None:
    save_reference(tmp_path, *world)
    reference = load_reference(tmp_path)
    check_reference(reference, world[0])
    assert [len(kinds) for kinds in reference.drawings] == [len(kinds) for kinds in world[1]]
    expected = world[1][0][1].resize((32, 32), Image.Resampling.LANCZOS)
    assert reference.drawings[0][1].tobytes() == expected.tobytes()


def test_drawings_of_another_vocabulary_are_refused(world: World) -> None:
    names = [list(thing.names) for thing in world[0].things]
    with pytest.raises(ValueError, match=r"reference\.json names other things"):
        check_reference(Reference(names[::-1], [], {}), world[0])


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"), [(0, 10, 0.0, 0.278), (5, 10, 0.237, 0.763), (81, 263, 0.255, 0.366)]
)
def test_wilsons_interval(successes: int, trials: int, low: float, high: float) -> None:
    """The third is a published example: Newcombe 1998, table I."""
    assert wilson(successes, trials) == pytest.approx((low, high), abs=0.0006)
