from __future__ import annotations

import hashlib

import pytest
from itsdangerous import URLSafeSerializer

from app.access.signing import Signer
from app.errors import InvalidToken

SECRET = "s" * 32
PAYLOAD = {"request_id": "abc", "index": 0}


@pytest.fixture
def signer() -> Signer:
    return Signer(SECRET)


def at(monkeypatch: pytest.MonkeyPatch, now: float) -> None:
    monkeypatch.setattr("app.access.signing.time.time", lambda: now)


def test_what_was_signed_comes_back(signer: Signer) -> None:
    token = signer.sign("picture link", PAYLOAD, 60)
    assert signer.read("picture link", token) == PAYLOAD
    assert Signer(SECRET.encode()).read("picture link", token) == PAYLOAD


def test_a_token_is_safe_in_urls_and_in_a_subprotocol(signer: Signer) -> None:
    token = signer.sign("live", {"origin": "https://é.example/?a=b c", "text": "x" * 500}, 60)
    assert set(token) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")


def test_a_token_ends_when_its_time_is_over(signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, 1000.0)
    token = signer.sign("live", PAYLOAD, 30)
    at(monkeypatch, 1029.9)
    assert signer.read("live", token) == PAYLOAD
    at(monkeypatch, 1030.0)
    with pytest.raises(InvalidToken, match="has expired"):
        signer.read("live", token)


def test_a_token_of_another_purpose_is_refused(signer: Signer) -> None:
    with pytest.raises(InvalidToken, match="not a valid live token"):
        signer.read("live", signer.sign("picture link", PAYLOAD, 60))


def test_a_token_of_another_secret_is_refused(signer: Signer) -> None:
    with pytest.raises(InvalidToken):
        signer.read("live", Signer("t" * 32).sign("live", PAYLOAD, 60))


@pytest.mark.parametrize("token", ["", ".", "a.b", "é", "\ud800", "\x00", "." * 10_000, "a" * 10_000])
def test_rubbish_is_refused(signer: Signer, token: str) -> None:
    with pytest.raises(InvalidToken):
        signer.read("live", token)


def test_every_changed_character_is_noticed(signer: Signer) -> None:
    token = signer.sign("live", PAYLOAD, 60)
    # The last character of a base64 text may carry unused bits, so the signature's end is left out.
    for index in range(len(token) - 1):
        other = "A" if token[index] != "A" else "B"
        with pytest.raises(InvalidToken):
            signer.read("live", token[:index] + other + token[index + 1 :])


def test_the_signature_is_hmac_sha256(signer: Signer) -> None:
    signature = signer.sign("live", PAYLOAD, 60).rpartition(".")[2]
    assert len(signature) == 43  # 32 bytes in base64
    weak = URLSafeSerializer(SECRET, salt="fewstep live", signer_kwargs={"digest_method": hashlib.sha1})
    with pytest.raises(InvalidToken):
        signer.read("live", weak.dumps({"until": 9e9, "payload": {}}))


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 32 bytes, this one has 5"):
        Signer("short")
