"""The examples of the documentation, run as it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from app.policy import PromptRequest, load_prompt_check
from broker.settings import SettingsError

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("# comment\n\nÉclair\nsour cream\n", encoding="utf-8")
    monkeypatch.setenv("BLOCKLIST", str(path))
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "blocklist", raising=False)
    return path


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize(
    ("prompt", "is_blocked"),
    [
        ("an eclair", True),
        ("an ÉCLAIR!", True),
        ("an ｅｃｌａｉｒ", True),
        ("an e\u200bclai\u0301r", True),
        ("sour_cream on top", True),
        ("sour \n cream", True),
        ("eclairs", False),
        ("a sour apple in cream", False),
        ("# comment", False),
    ],
)
def test_the_block_list(prompt: str, is_blocked: bool) -> None:
    check = load_prompt_check("blocklist:check")
    assert check is not None
    answer = check(PromptRequest(prompt, None, "mini-lcm", "anonymous", None, "api"))
    assert (answer is not None) == is_blocked


def test_a_block_list_without_its_file_fails_the_start(words: Path) -> None:
    words.unlink()
    with pytest.raises(SettingsError, match="can't import blocklist: FileNotFoundError"):
        load_prompt_check("blocklist:check")
