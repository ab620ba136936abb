from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from models.hub.errors import SourceError
from models.hub.lockfile import Lock, LockedFile, LockedRepository, add_to_lock, lock_key, read_lock, write_lock

ONE, TWO = "1" * 40, "2" * 40
FILE = LockedFile(sha256="a" * 64, size=3)


def test_it_reads_what_it_wrote_and_sorts_it(tmp_path: Path) -> None:
    path = tmp_path / "fewstep.lock"
    assert read_lock(path) == Lock()
    lock = Lock().with_files("b/b", ONE, {"z": FILE, "a/b": FILE}).with_files("a/a", TWO, {"c": FILE})
    write_lock(path, lock)
    assert read_lock(path) == lock
    text = path.read_text(encoding="utf-8")
    assert list(json.loads(text)["repositories"]) == ["a/a", "b/b"]
    assert text.index('"a/b"') < text.index('"z"')
    assert [child.name for child in tmp_path.iterdir()] == ["fewstep.lock"]


def test_files_of_a_commit_add_up_and_another_commit_starts_anew() -> None:
    lock = Lock().with_files("a/a", ONE, {"x": FILE}).with_files("a/a", ONE, {"y": FILE})
    assert set(lock.repositories["a/a"].files) == {"x", "y"}
    assert set(lock.with_files("a/a", TWO, {"z": FILE}).repositories["a/a"].files) == {"z"}


def test_another_revision_is_locked_on_its_own() -> None:
    assert (lock_key("a/a", None), lock_key("a/a", "fp16")) == ("a/a", "a/a@fp16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Invalid JSON"),
        ('{"version": 2}', "version: Input should be 1"),
        ('{"repositories": {"a/a": {"commit": "main", "files": {}}}}', "repositories.a/a.commit: String should match"),
        (f'{{"repositories": {{"a/a": {{"commit": "{ONE}", "files": {{"../x": {{}}}}}}}}}}', "'../x' leads out"),
    ],
)
def test_a_broken_one_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "fewstep.lock"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SourceError, match=r"fewstep\.lock: ") as caught:
        read_lock(path)
    assert message in str(caught.value)


def test_a_place_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"can't write the lock file .*no/fewstep.lock: No such file or directory"):
        write_lock(tmp_path / "no" / "fewstep.lock", Lock())


def test_those_who_add_at_once_lose_nothing_of_each_other(tmp_path: Path) -> None:
    path, repository = tmp_path / "fewstep.lock", LockedRepository(commit=ONE, files={"x": FILE})
    keys = [f"a/{number}" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: add_to_lock(path, key, repository), keys))
    assert set(read_lock(path).repositories) == set(keys)


def test_what_another_added_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "fewstep.lock"
    write_lock(path, Lock().with_files("b/b", TWO, {"y": FILE}).with_files("a/a", ONE, {"z": FILE}))
    add_to_lock(path, "a/a", LockedRepository(commit=ONE, files={"x": FILE}))
    locked = read_lock(path).repositories
    assert {key: set(value.files) for key, value in locked.items()} == {"a/a": {"x", "z"}, "b/b": {"y"}}


def test_a_place_that_nothing_can_be_added_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match=r"can't write the lock file .*fewstep.lock: "):
        add_to_lock(tmp_path / "file" / "fewstep.lock", "a/a", LockedRepository(commit=ONE, files={}))
