"""What the documentation shows runs as it stands there, from top to bottom."""

from __future__ import annotations

import asyncio
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.app.conftest import Api
from tests.app.peers import open_image

DOCS = Path(__file__).resolve().parents[3] / "docs"
ADDRESS = "127.0.0.1:8000"
STRICT_SHELL = 'set -euo pipefail\ncurl() { command curl --fail-with-body --max-time 30 "$@"; }\n'


def read_blocks(page: str) -> list[tuple[str, str]]:
    """The shell and Python blocks of a page, in order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```(sh|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


async def run(language: str, code: str, folder: Path) -> str:
    """Its output, once it has ended well."""
    program = ["bash", "-c", STRICT_SHELL + code] if language == "sh" else [sys.executable, "-c", code]
    process = await asyncio.create_subprocess_exec(
        *program, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    assert process.returncode == 0, f"{code}\n{output.decode(errors='replace')}"
    return output.decode(errors="replace")


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("bash")), reason="the examples use curl and a shell")
async def test_the_api_page(api: Api, tmp_path: Path) -> None:
    blocks = read_blocks("api.md")
    outputs = [
        await run(language, code.replace(ADDRESS, f"127.0.0.1:{api.port}"), tmp_path) for language, code in blocks
    ]
    assert {language for language, _ in blocks} == {"sh", "python"}
    assert open_image((tmp_path / "apple.png").read_bytes()).format == "PNG"
    assert open_image((tmp_path / "panda.jpg").read_bytes()).format == "JPEG"
    assert any("event: completed" in output for output in outputs)
