"""How a prompt finds its class."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.catalog import ClassNames, UnknownClassError
from models.catalog.classes import ClassFileError, load_classes


@pytest.fixture(scope="module")
def imagenet() -> ClassNames:
    return load_classes("imagenet")


WELL_KNOWN = {
    0: "tench",
    1: "goldfish",
    207: "golden retriever",
    281: "tabby",
    340: "zebra",
    388: "giant panda",
    817: "sports car",
    963: "pizza",
    985: "daisy",
    999: "toilet tissue",
}


def test_imagenet_has_its_thousand_classes_in_their_order(imagenet: ClassNames) -> None:
    assert len(imagenet) == 1000
    assert {number: imagenet.names(number)[0] for number in WELL_KNOWN} == WELL_KNOWN


def test_every_name_and_number_finds_a_class_that_has_it(imagenet: ClassNames) -> None:
    for number in range(1000):
        assert imagenet.find(f"class {number}") == number
        for name in imagenet.names(number):
            found = imagenet.find(name)
            assert number in (found, *imagenet.namesakes(name))


@pytest.mark.parametrize(
    ("prompt", "number"),
    [
        ("golden retriever", 207),
        ("  Golden \n RETRIEVER ", 207),
        ("a zebra", 340),
        ("Ailuropoda melanoleuca", 388),
        ("class 207", 207),
        ("Class  207", 207),
        ("207", 207),
        ("007", 7),
    ],
)
def test_a_prompt_names_a_class(imagenet: ClassNames, prompt: str, number: int) -> None:
    assert imagenet.find(prompt) == number


@pytest.mark.parametrize(
    ("shared", "drawn", "others"),
    [
        ("crayfish", 124, [123]),  # the second's usual name
        ("panda", 388, [387]),  # its second name, the other's third
        ("crane", 134, [517]),  # both by their only name: the bird comes first
        ("Maillot", 638, [639]),
        ("zebra", 340, []),
    ],
)
def test_a_shared_name_is_that_of_the_class_that_it_names_best(
    imagenet: ClassNames, shared: str, drawn: int, others: list[int]
) -> None:
    assert (imagenet.find(shared), imagenet.namesakes(shared)) == (drawn, others)


@pytest.mark.parametrize(
    ("prompt", "suggestions"),
    [
        ("dog", ["hot dog", "coach dog", "hyena dog", "Eskimo dog", "monkey dog"]),
        ("gold", ["goldfish", "goldfinch", "golden retriever", "black and gold garden spider"]),
        ("goldfsh", ["goldfish", "goldfinch"]),
        ("a goldfish in a soup bowl", ["soup bowl", "goldfish", "mixing bowl"]),
        ("a red apple on a blue background", ["custard apple"]),
        ("class 1000", []),
        ("9" * 2000, []),
    ],
)
def test_a_miss_tells_what_is_near(imagenet: ClassNames, prompt: str, suggestions: list[str]) -> None:
    with pytest.raises(UnknownClassError, match="no class is called") as caught:
        imagenet.find(prompt)
    assert caught.value.suggestions == suggestions
    assert len(str(caught.value)) < 100


def test_examples_are_from_all_over_the_list(imagenet: ClassNames) -> None:
    examples = imagenet.examples(10)
    assert [imagenet.find(name) // 100 for name in examples] == list(range(10))
    assert load_classes("imagenet").examples(5000)[999] == "toilet tissue"


def test_a_file_of_ones_own_where_a_name_may_be_a_number(tmp_path: Path) -> None:
    path = tmp_path / "digits.txt"
    path.write_text("zero, 0\nfour, 4\nfive , 5\n", encoding="utf-8")
    classes = load_classes(str(path))
    assert len(classes) == 3
    assert [classes.find(prompt) for prompt in ("0", "4", "FIVE", "class 1", "1")] == [0, 1, 2, 1, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\n\ndog\n", r"own\.txt, line 2: a name is missing"),
        ("cat, tabby\ndog,, hound\n", r"own\.txt, line 2: a name is missing"),
        ("", r"own\.txt: it has no line"),
    ],
)
def test_a_bad_file_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ClassFileError, match=message):
        load_classes(str(path))


def test_a_missing_file_and_one_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ClassFileError, match=r"nowhere\.txt"):
        load_classes(str(tmp_path / "nowhere.txt"))
    (tmp_path / "picture.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ClassFileError, match=r"picture\.txt: .*utf-8"):
        load_classes(str(tmp_path / "picture.txt"))
