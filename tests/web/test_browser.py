"""A missing browser is told, and in CI it is a failure."""

from __future__ import annotations

import pytest

from tests.web.conftest import give_up


def test_it_is_skipped_loudly_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="WAS NOT TESTED: no Chromium"):
        give_up("no Chromium")


def test_it_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no Chromium"):
        give_up("no Chromium")
