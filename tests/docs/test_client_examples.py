"""The programs in docs/examples and the blocks of the clients' pages, run against a real service as they are."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.xdist_group("service")
REPOSITORY = Path(__file__).resolve().parents[2]
ENDS = ("gave way to newer words", "after step 4 of 4")
EXAMPLES = REPOSITORY / "docs" / "examples"
SERVICE = "http://127.0.0.1:8000"


def run(program: Path, *arguments: str, folder: Path) -> str:
    """What it printed; its files are left in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "clients" / "python" / "src")}
    command = [sys.executable, "-W", "error", str(program), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """Of the pictures in it."""
    pictures = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".py"}
    return {name: Image.open(io.BytesIO(data)).size for name, data in pictures.items()}


def python_blocks(page: str) -> list[str]:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_live_client(service_url: str, tmp_path: Path) -> None:
    output = run(EXAMPLES / "live_client.py", service_url, folder=tmp_path)
    gave_way, drawn = (set(re.findall(rf"^('.*') {what}$", output, re.MULTILINE)) for what in ENDS)
    assert len(gave_way | drawn) == len("a red apple on a blue background"), "each change is drawn, or newer words are"
    assert "'a red apple on a blue background' after step 4 of 4" in output
    assert output.splitlines()[-1].startswith("refined, in ")
    assert sizes(tmp_path) == {"apple.jpeg": (64, 64)}


def test_http_client(service_url: str, tmp_path: Path) -> None:
    output = run(EXAMPLES / "http_client.py", service_url, folder=tmp_path)
    assert "seed 7, drawn in " in output
    assert "preview after step " in output
    names = ["apple.jpeg", "fox.png", *(f"panda-{index}.jpeg" for index in range(4))]
    assert sizes(tmp_path) == dict.fromkeys(names, (64, 64))


@pytest.mark.parametrize(
    ("page", "num_blocks"), [("README.md", 2), ("docs/live-protocol.md", 2), ("clients/python/README.md", 2)]
)
def test_every_python_block_of_a_page_runs_as_it_is(
    page: str, num_blocks: int, service_url: str, tmp_path: Path
) -> None:
    blocks = python_blocks(page)
    assert len(blocks) == num_blocks
    for number, block in enumerate(blocks):
        folder = tmp_path / str(number)
        folder.mkdir()
        program = folder / "block.py"
        program.write_text(at(service_url, block), encoding="utf-8")
        run(program, folder=folder)
        assert set(sizes(folder).values()) == {(64, 64)}


def at(service_url: str, block: str) -> str:
    """The block with the address of the service under test in place of the usual one."""
    usual, here = SERVICE.removeprefix("http"), service_url.removeprefix("http")
    assert usual in block
    return block.replace(usual, here)
