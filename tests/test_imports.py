"""The import rule: cli -> commands -> {app, workers} -> {broker, models}; the gateway never loads torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("commands", "app", "workers", "broker", "models")
# What a module whose name starts so may import of the other packages.
ALLOWED = {
    "commands": ("app", "workers", "broker", "models", "supervisor"),
    "app": ("broker", "models.catalog"),
    "workers.engine": ("broker.messages", "models"),
    "workers": ("broker", "models"),
    "broker": (),
    "models": (),
}


def local_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.split(".")[0] in (*PACKAGES, "cli", "supervisor", "tests"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    module = module_name(path)
    package = module.split(".")[0]
    allowed = next(names for prefix, names in ALLOWED.items() if f"{module}.".startswith(f"{prefix}."))
    for name in local_imports(path):
        is_allowed = any(f"{name}.".startswith(f"{prefix}.") for prefix in (package, *allowed))
        assert is_allowed, f"{module} imports {name}"


@pytest.mark.parametrize("module", ["app.main", "cli"])
def test_the_gateway_never_loads_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
