"""Whether everybody can use the live page: axe-core's rules, the keyboard, and what a screen reader is told."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any, Literal

import pytest
from playwright.sync_api import Page, expect

from tests.web.conftest import OpenPage
from tests.web.pages import PROMPT, shows_final, shows_refined

pytestmark = pytest.mark.xdist_group("service")
AXE = files("axe_playwright_python").joinpath("axe.min.js")
SIZES = {"phone": (390, 844), "desk": (1280, 800)}


def violations(page: Page) -> list[str]:
    """What axe-core finds, serious and critical or not."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = page.evaluate("axe.run().then((result) => result.violations)")
    return [f"{rule['impact']} {rule['id']}: {node['html']}" for rule in found for node in rule["nodes"]]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(open_page: OpenPage, size: str, theme: Literal["light", "dark"]) -> None:
    width, height = SIZES[size]
    page = open_page(width=width, height=height, theme=theme)
    assert violations(page) == []
    page.keyboard.insert_text(PROMPT)
    shows_refined(page, PROMPT)
    expect(page.locator("#strip button")).to_have_count(1)
    page.get_by_label("Guidance").fill("1.5")
    page.get_by_label("2 × 2").check(force=True)
    shows_final(page, f"4 pictures of {PROMPT}")
    assert violations(page) == []


def test_axe_would_find_something(open_page: OpenPage) -> None:
    page = open_page()
    page.evaluate("document.querySelector('label[for=steps]').remove()")
    assert [found.partition(":")[0] for found in violations(page)] == ["critical label"]


def test_every_control_is_reached_by_the_tab_key_and_shows_that_it_is(open_page: OpenPage) -> None:
    page = open_page(state=f"#prompt={PROMPT.replace(' ', '+')}")
    expect(page.locator("#strip button")).to_have_count(1)
    page.locator("#prompt").focus()
    reached: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        stop = page.evaluate(
            """() => {
              const { activeElement: at } = document;
              const seen = at.matches("[type=radio]") ? at.nextElementSibling : at;
              const { outlineStyle, outlineWidth } = getComputedStyle(seen);
              return { id: at.id || at.parentElement.tagName, isSeen: outlineStyle !== "none" && outlineWidth > "0" };
            }"""
        )
        if stop["id"] in ("HTML", "prompt"):
            break
        assert stop["isSeen"], stop
        reached.append(stop["id"])
    wanted = [
        "more-ideas", "model", "scheduler", "steps", "guidance", "format", "seed", "lock", "new-seed", "grid-1",
        "refine", "download", "link", "curl", "python", "javascript", "LI",
    ]  # fmt: skip
    assert [stop for stop in reached if stop in wanted] == wanted


def test_a_screen_reader_hears_of_a_picture_after_a_pause(open_page: OpenPage) -> None:
    page = open_page()
    page.keyboard.type(PROMPT)
    spoken = page.get_by_role("status").filter(has_text="Picture of")
    expect(spoken).to_contain_text(f"Picture of {PROMPT}, after")
    expect(page.locator("#plot")).to_have_accessible_name(re.compile(r"median [\d.]+ ms, 95th percentile [\d.]+ ms"))
