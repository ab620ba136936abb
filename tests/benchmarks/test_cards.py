"""That the weights that ship draw as well as their card says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.fidelity import MARKS, Bench, Row, Share
from benchmarks.shared.painting import Setting
from models.catalog import BUNDLED_PATH
from models.training.mini.export import CARDS
from models.training.mini.judging import wilson

PROMPTS = 30  # of each kind
SETTINGS = {
    "mini-sd": Setting("mini-lcm", "lcm", 4, 0),
    "mini-sdxl": Setting("mini-sdxl", "ddim", 8, 3),
    "mini-lcm-full": Setting("mini-lcm-full", "lcm", 4, 3),
    "mini-turbo-lora": Setting("mini-turbo", "euler-ancestral", 1, 0),
}
"""By the card that has the figures."""
COLUMNS = ("object", "object_top5", "shape", "tinted", "pair", "background")


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    bench = Bench(PROMPTS)
    return {card: bench.measure(setting) for card, setting in SETTINGS.items()}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("card", SETTINGS)
def test_the_weights_are_within_the_interval_of_their_card(rows: dict[str, Row], card: str, column: str) -> None:
    measured: Share = getattr(rows[card], column)
    low, high = wilson(measured.right, measured.of)
    card_low, card_high = card_interval(BUNDLED_PATH / card / "README.md", str(SETTINGS[card]), column)
    assert low <= card_high / 100 + 0.005
    assert high >= card_low / 100 - 0.005


def card_interval(card: Path, row: str, column: str) -> tuple[float, float]:
    """In percent, as the table of figures in a card says it."""
    _, _, rest = card.read_text(encoding="utf-8").partition(MARKS[0])
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in rest.partition(MARKS[1])[0].split("\n")]
    header = next(line for line in table if "pictures" in line)
    line = next(line for line in table if line[0] == row)
    found = re.fullmatch(r"\d+ \((\d+) to (\d+)\)", line[header.index(column)])
    assert found is not None
    return float(found[1]), float(found[2])


@pytest.mark.parametrize("shipped", sorted(BUNDLED_PATH.glob("*/README.md")), ids=lambda card: card.parent.name)
def test_each_card_that_ships_is_the_one_in_the_source(shipped: Path) -> None:
    card = CARDS / f"{shipped.parent.name}.md"
    assert shipped.read_text(encoding="utf-8") == card.read_text(encoding="utf-8")
