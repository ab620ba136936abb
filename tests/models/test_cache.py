from __future__ import annotations

from pathlib import Path

import pytest

from models.hub import cache

COMMIT = "1" * 40


@pytest.mark.parametrize(("text", "commit"), [("", None), ("\n", None), (COMMIT, COMMIT)])
def test_an_empty_ref_counts_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, commit: str | None
) -> None:
    monkeypatch.setattr(cache, "HF_HUB_CACHE", str(tmp_path))
    ref = tmp_path / "models--acme--sd" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text(text, encoding="utf-8")
    assert cache.cached_commit("acme/sd", None) == commit
