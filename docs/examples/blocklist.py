"""A prompt check to start from: a list of words and phrases. It is no moderation; ../content-policy.md says why.

BLOCKLIST=words.txt PYTHONPATH=docs/examples FEWSTEP_PROMPT_CHECK=blocklist:check fewstep gateway
"""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

from app.policy import PromptRequest


def normalise(text: str) -> str:
    """Words with single spaces between them; case, accents, invisible characters and typographic forms don't count."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    visible = "".join(char for char in plain if unicodedata.category(char) not in ("Mn", "Cf"))
    return " ".join(re.findall(r"[^\W_]+", visible))


def read_phrases(path: Path) -> frozenset[str]:
    """One word or phrase per line; lines that begin with # are comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return frozenset(filter(None, (normalise(line) for line in lines if not line.startswith("#"))))


PHRASES = read_phrases(Path(os.environ["BLOCKLIST"]))  # at import, so that a missing file fails the gateway's start


def check(request: PromptRequest) -> str | None:
    text = f" {normalise(request.prompt)} "
    return "it asks for what isn't drawn here" if any(f" {phrase} " in text for phrase in PHRASES) else None
