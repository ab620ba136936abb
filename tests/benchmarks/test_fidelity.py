"""That the measure runs from end to end; its figures are for people."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

from benchmarks.shared.painting import GAP, LABEL_WIDTH
from models.training.entries import lcm_rules, write_table

ENTRY = {
    "description": "the bundled model, of two steps at most",
    "family": "sd",
    "source": "bundled:mini-sd",
    "variant": "fp16",
    "license": "Apache-2.0",
    "sizes": [[64, 64]],
    "warm_sizes": [[64, 64]],
    "guidance_scale": {"default": 0.0, "min": 0.0, "max": 2.0},
    "lora": {"source": "bundled:mini-lcm-lora"},
    **lcm_rules(20),
    "num_inference_steps": {"default": 2, "min": 1, "max": 2},
}


def test_every_row_of_a_question_is_judged(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.fidelity", "--prompts", "6", "--questions", "decoder"]
    command += ["--json", str(report), "--sheets", str(tmp_path), "--gallery", str(tmp_path / "gallery.webp")]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=180).stdout
    assert report.exists(), output
    painted, rebuilt, drawn = json.loads(report.read_text())["rows"]
    assert painted["background"] == {"right": 24, "of": 24}
    assert painted["object"]["right"] >= 5
    assert rebuilt["object"]["right"] >= 4
    assert drawn["pictures"] == "mini-lcm, lcm, 4 steps, guidance 0, tiny decoder"
    assert drawn["object"]["right"] >= 3
    assert drawn["diversity"] > 0
    assert (tmp_path / "painted.webp").exists()
    with Image.open(tmp_path / "gallery.webp") as gallery:
        assert gallery.size == (LABEL_WIDTH + 8 * 64, 3 * 64 + 2 * GAP)


def test_the_models_of_another_catalog_are_judged_alone(tmp_path: Path) -> None:
    report, catalog = tmp_path / "report.json", tmp_path / "catalog.toml"
    catalog.write_text(write_table("mine", ENTRY), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.fidelity", "--prompts", "4", "--json", str(report)]
    command += ["--questions", "--extra-catalog", str(catalog)]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=180).stdout
    assert report.exists(), output
    _, _, *drawn = json.loads(report.read_text())["rows"]
    assert [row["pictures"] for row in drawn] == ["mine, lcm, 1 step, guidance 0", "mine, lcm, 2 steps, guidance 0"]
    assert drawn[1]["object"]["right"] >= 2


def test_a_style_is_judged_with_and_without(tmp_path: Path) -> None:
    report, card = tmp_path / "report.json", tmp_path / "card.md"
    card.write_text("before\n<!-- figures: start -->\nold\n<!-- figures: end -->\nafter\n")
    command = [sys.executable, "-m", "benchmarks.styles", "neon", "--prompts", "5", "--json", str(report)]
    output = subprocess.run(
        [*command, "--card", str(card)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=180
    ).stdout
    assert report.exists(), output
    rows = {row["pictures"]: row for row in json.loads(report.read_text())["rows"]}
    worn = rows["mini-lcm, lcm, 4 steps, guidance 0, neon 1"]
    assert worn["to_style"] < worn["to_plain"]
    assert rows["mini-lcm, lcm, 4 steps, guidance 0"]["to_plain"] < worn["to_plain"]
    text = card.read_text()
    assert text.startswith("before\n<!-- figures: start -->\n| pictures |")
    assert text.endswith("<!-- figures: end -->\nafter\n")
    assert "old" not in text
