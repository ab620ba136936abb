from __future__ import annotations

import datetime
import hmac
import logging
import os
import stat
from pathlib import Path

import pytest

from app.access.key_file import add_key, format_entry, format_table, make_key, new_record, remove_key
from app.access.keys import KeyRing, hash_key, parse_entries, parse_file
from app.errors import Unauthorized
from app.settings import GatewaySettings
from broker.settings import SettingsError

SHA = "0123456789abcdef" * 4
ID, OTHER_ID = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
FULL = {
    "name": 'the "shop", ünder',
    "weight": 3,
    "max_requests_per_minute": 60,
    "max_images_per_minute": 120,
    "models": ["mini-lcm", "sd15-lcm"],
    "lanes": ["api"],
    "created": datetime.date(2026, 11, 24),
}


def write_key(path: Path, **fields: object) -> tuple[str, str]:
    """The id and the text of a new key in the file."""
    key_id, key = make_key()
    add_key(path, new_record(key, **fields), key_id)
    return key_id, key


def ring_of(path: Path) -> KeyRing:
    return KeyRing(GatewaySettings.load(api_keys_file=path))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def test_a_key_carries_its_id_and_256_random_bits() -> None:
    key_id, key = make_key()
    prefix, id_in_key, secret = key.split("_", 2)
    assert (prefix, id_in_key, len(secret)) == ("fs", key_id, 43)
    assert make_key()[1] != key


def test_the_file_holds_no_key_and_is_its_owners_alone(path: Path) -> None:
    _, key = write_key(path)
    assert key.split("_", 2)[2] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [child.name for child in path.parent.iterdir()] == ["keys.toml"]


def test_a_record_comes_back_from_file_and_variable_as_it_was(path: Path) -> None:
    record = new_record("fs_x_y", **FULL)
    path.write_text(format_table(ID, record))
    assert parse_file(path) == {ID: record}
    assert parse_entries(format_entry(ID, record)) == {ID: record}
    plain = new_record("fs_x_y")
    both = f"{format_entry(ID, record)},\n{format_entry(OTHER_ID, plain)}"
    assert parse_entries(both) == {ID: record, OTHER_ID: plain}
    assert format_entry(OTHER_ID, plain) == f"{OTHER_ID}:{hash_key('fs_x_y')}"


def test_a_key_becomes_its_caller(path: Path) -> None:
    key_id, key = write_key(path, **FULL)
    caller = ring_of(path).find(key)
    assert (caller.owner, caller.weight, caller.lanes) == (key_id, 3, frozenset({"api"}))
    assert caller.models == frozenset({"mini-lcm", "sd15-lcm"})
    assert (caller.max_requests_per_minute, caller.max_images_per_minute) == (60, 120)


def test_creating_and_revoking_leave_the_rest_of_the_file_alone(path: Path) -> None:
    first, _ = write_key(path, name="first")
    path.write_text("# mine\n" + path.read_text() + "\n# about the second\n")
    second, _ = write_key(path, name="second", models=["a", "b"])
    third, _ = write_key(path, name="third")
    assert remove_key(path, second).name == "second"
    assert list(parse_file(path)) == [first, third]
    text = path.read_text()
    assert "# mine" in text
    assert "# about the second" in text
    assert second not in text
    remove_key(path, first)
    remove_key(path, third)
    assert parse_file(path) == {}
    assert path.read_text().startswith("# mine\n# API keys of fewstep")


def test_a_layout_that_cannot_be_changed_safely_stays(path: Path) -> None:
    path.write_text(f'[{ID}]\nsha256 = "{SHA}"\n\nname = "apart"\n')
    before = path.read_text()
    with pytest.raises(SettingsError, match="edit it by hand"):
        remove_key(path, ID)
    assert path.read_text() == before
    assert [child.name for child in path.parent.iterdir()] == ["keys.toml"]


def test_revoking_an_unknown_key_lists_those_there_are(path: Path) -> None:
    key_id, _ = write_key(path, name="shop")
    with pytest.raises(SettingsError, match=f"no key 'nope'.*{key_id} shop"):
        remove_key(path, "nope")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the file is empty"),
        ("[", "Invalid initial character"),
        ("\xff", "utf-8"),
        (f'[{ID}]\nname = "x"', "sha256: Field required"),
        (f'[{ID}]\nsha256 = "abc"', "sha256: String should match"),
        (f'[{ID}]\nsha256 = "{SHA}"\nweight = 0', "weight: "),
        (f'[{ID}]\nsha256 = "{SHA}"\nlanes = []', "lanes: "),
        (f'[{ID}]\nsha256 = "{SHA}"\nlanes = ["fast"]', "lanes"),
        (f'[{ID}]\nsha256 = "{SHA}"\nmodels = []', "models"),
        (f'[{ID}]\nsha256 = "{SHA}"\nkey = "fs_"', "key: Extra inputs"),
        (f'[anonymous]\nsha256 = "{SHA}"', "12 hexadecimal digits"),
        ('sha256 = "x"', "12 hexadecimal digits"),
    ],
)
def test_a_fault_in_the_file_is_named(path: Path, text: str, words: str) -> None:
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(SettingsError, match=f"^FEWSTEP_API_KEYS_FILE='{path}': .*{words}") as caught:
        ring_of(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["fs_aaaaaaaaaaaa_secret", f"{ID}:secret", f"{ID}:{SHA}?weight", f"{ID}:{SHA}?weight=1&weight=2", f"x:{SHA}"],
)
def test_a_fault_in_the_variable_is_named_without_its_value(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^FEWSTEP_API_KEYS: ") as caught:
        parse_entries(text)
    assert "secret" not in str(caught.value)


def test_a_missing_file_and_one_without_keys_do_not_start(path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        ring_of(path)
    path.write_text("# none yet\n")
    with pytest.raises(SettingsError, match="holds no key: make one with fewstep keys create"):
        ring_of(path)


@pytest.mark.parametrize(
    "text", ["", "fs", "fs_", "fs__", "_" * 50, "none", "fs_aaaaaaaaaaaa_", "é" * 9, "\ud800_a_b", "\0"]
)
def test_rubbish_is_no_key(path: Path, text: str) -> None:
    write_key(path)
    with pytest.raises(Unauthorized, match="is not valid"):
        ring_of(path).find(text)


def test_one_wrong_character_is_no_key(path: Path) -> None:
    _, key = write_key(path)
    ring = ring_of(path)
    for wrong in (key[:-1], key + "A", key[:-1] + ("A" if key[-1] != "A" else "B"), key.upper()):
        with pytest.raises(Unauthorized):
            ring.find(wrong)


def test_a_secret_opens_only_under_its_own_id(path: Path) -> None:
    (first, key), (second, _) = write_key(path), write_key(path)
    with pytest.raises(Unauthorized):
        ring_of(path).find(key.replace(first, second))


def test_unknown_and_wrong_keys_cost_the_same_timing_safe_comparison(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_id, _ = write_key(path)
    ring = ring_of(path)
    compared: list[tuple[int, int]] = []

    def compare(one: str, other: str) -> bool:
        compared.append((len(one), len(other)))
        return real(one, other)

    real = hmac.compare_digest
    monkeypatch.setattr("app.access.keys.hmac.compare_digest", compare)
    for text in ("rubbish", "fs_cccccccccccc_x", f"fs_{key_id}_wrong"):
        with pytest.raises(Unauthorized):
            ring.find(text)
    assert compared == [(64, 64)] * 3


def test_what_is_made_and_revoked_counts_at_the_next_look(path: Path) -> None:
    first_id, first = write_key(path)
    ring = ring_of(path)
    _, second = write_key(path)
    with pytest.raises(Unauthorized):
        ring.find(second)
    ring.reload()
    ring.find(second)
    remove_key(path, first_id)
    ring.reload()
    with pytest.raises(Unauthorized, match="revoked"):
        ring.find(first)
    with pytest.raises(Unauthorized, match="revoked"):
        ring.get(first_id)


@pytest.mark.parametrize("damage", [b"", b"[[[", None])
def test_a_file_that_breaks_keeps_the_keys_and_is_told_once(
    path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    _, key = write_key(path)
    ring = ring_of(path)
    good = path.read_bytes()
    path.unlink() if damage is None else path.write_bytes(damage)
    for _ in range(3):
        ring.reload()
    ring.find(key)
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert "the keys stay as they were" in record.getMessage()
    path.write_bytes(good)
    _, other = write_key(path)
    ring.reload()
    ring.find(other)


def test_a_file_that_loses_its_last_key_while_running_lets_nobody_in(path: Path) -> None:
    key_id, key = write_key(path)
    ring = ring_of(path)
    remove_key(path, key_id)
    ring.reload()
    with pytest.raises(Unauthorized):
        ring.find(key)


def test_keys_of_the_variable_and_of_the_file_count_both(path: Path) -> None:
    _, in_file = write_key(path)
    key_id, key = make_key()
    entry = format_entry(key_id, new_record(key))
    ring = KeyRing(GatewaySettings.load(api_keys=entry, api_keys_file=path))
    assert ring.find(key).owner == key_id
    ring.find(in_file)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_the_file_keeps_its_owner(path: Path) -> None:
    write_key(path)
    os.chown(path, 12_345, 12_345)
    write_key(path)
    assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (12_345, 0o600)
