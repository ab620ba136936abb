from __future__ import annotations

import pytest

from app.http.redaction import redact

SECRET = "x" * 43


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"authorization: Bearer fs_aaaaaaaaaaaa_{SECRET}", "authorization: Bearer fs_aaaaaaaaaaaa_…"),
        ("fewstep.live.v1, fewstep.auth.eyJ1.x_-y", "fewstep.live.v1, fewstep.auth.…"),
        ("GET /v1/live?api_key=abc&x=1 HTTP/1.1", "GET /v1/live?api_key=…&x=1 HTTP/1.1"),
        ("""TEXT '{"type":"auth","token":"eyJ1.x"}'""", """TEXT '{"type":"auth","token":"…"}'"""),
        ('TEXT \'{"prompt":"a red apple, seed=7"}\'', 'TEXT \'{"prompt":"a red apple, seed=7"}\''),
    ],
)
def test_credentials_are_cut_out(text: str, shown: str) -> None:
    assert redact(text) == shown
