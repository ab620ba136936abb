"""One table of keys for Python and Lua."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from broker import scripts
from broker.keys import Keys, lua_key_functions
from broker.scripts import load_script
from tests.broker.helpers import MODEL

SCRIPTS = sorted(file.stem for file in Path(scripts.__file__).parent.glob("scripts/[a-z]*.lua"))


def test_keys_stand_under_their_prefix() -> None:
    keys = Keys("{one}")
    assert keys.ready(MODEL) == "{one}:ready:small"
    assert keys.build("line", "api", MODEL, "ann:the:first") == "{one}:line:api:small:ann:the:first"
    with pytest.raises(ValueError, match="'job' key is made of"):
        keys.build("job")


def test_lua_builds_the_same_keys() -> None:
    functions = lua_key_functions()
    assert "local function depth_key(model) return KEYS[1] .. ':depth' .. ':' .. model end" in functions
    assert "local function kept_key() return KEYS[1] .. ':kept' end" in functions


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_name_no_key_themselves(name: str) -> None:
    text = load_script(name).text.removeprefix(lua_key_functions())
    defined = set(re.findall(r"local function (\w+_key)\(", lua_key_functions()))
    assert "KEYS" not in text
    assert set(re.findall(r"\b(\w+_key)\(", text)) <= defined
