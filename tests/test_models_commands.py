"""fewstep models against a Hub on this machine: what is fetched, locked, checked and removed."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hub_server import TOKEN, Hub, read_folder, serve_hub
from tests.service import free_port
from tests.small_models import small_spec
from tests.test_cli import assert_one_clear_line, fewstep

UNET = "unet/diffusion_pytorch_model.fp16.safetensors"
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
NEEDED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/vocab.json",
    "unet/config.json",
    UNET,
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}
OTHERS = {
    "README.md",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.safetensors",
    "whole.safetensors",
}
LORA = "pytorch_lora_weights.safetensors"
TINY = {"config.json", "diffusion_pytorch_model.safetensors"}


def make_files(names: set[str], version: int = 1) -> dict[str, bytes]:
    """Random bytes, the same for the same name and version; of the index its true content."""
    files = {name: random.Random(f"{name} {version}").randbytes(300_000) for name in names}
    small = {name: json.dumps({"name": name, "version": version}).encode() for name in names if name.endswith(".json")}
    return files | small | ({"model_index.json": json.dumps(INDEX).encode()} if "model_index.json" in names else {})


def write_entry(name: str, source: str = "acme/sd", extra: str = "") -> str:
    return f"""
[{name}]
description = "random bytes"
family = "sd"
source = "{source}"
variant = "fp16"
license = "MIT"
{extra}
default_scheduler = "lcm"
num_inference_steps = {{ default = 4, min = 1, max = 8 }}
guidance_scale = {{ default = 0, min = 0, max = 2 }}
sizes = [[32, 32], [48, 32]]
warm_sizes = [[32, 32]]
schedulers = {{ lcm = {{ class_name = "LCMScheduler" }}, ddim = {{ class_name = "DDIMScheduler" }} }}
"""


@dataclass
class Desk:
    """Somebody at a machine: a catalog, a cache and a lock file, beside a Hub."""

    hub: Hub
    root: Path

    @property
    def lock_file(self) -> Path:
        return self.root / "fewstep.lock"

    @property
    def locked(self) -> dict[str, Any]:
        repositories: dict[str, Any] = json.loads(self.lock_file.read_text(encoding="utf-8"))["repositories"]
        return repositories

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.root / "hf"),
            "FEWSTEP_CATALOG": str(self.root / "catalog.toml"),
            "FEWSTEP_LOCK_FILE": str(self.lock_file),
            "FEWSTEP_DEVICE": "cpu",
        }

    def write_catalog(self, *entries: str) -> None:
        (self.root / "catalog.toml").write_text("".join(entries), encoding="utf-8")

    def models(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return fewstep("models", *arguments, **(self.environment | environment))

    def pull(self, *arguments: str, **environment: str) -> str:
        """One that succeeds; what it said."""
        result = self.models("pull", *arguments, **environment)
        assert result.returncode == 0, result.stderr
        return result.stderr

    def files(self, repository: str = "acme/sd") -> dict[str, Path]:
        """In the cache, whatever their commit."""
        snapshots = self.root / "hf" / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots"
        return {
            "/".join(path.relative_to(snapshots).parts[1:]): path for path in snapshots.rglob("*") if path.is_file()
        }

    def blobs(self, repository: str = "acme/sd") -> list[Path]:
        return list((self.root / "hf" / "hub" / f"models--{repository.replace('/', '--')}" / "blobs").glob("*"))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """With `big` in its catalog, made of three repositories."""
    with serve_hub() as hub:
        hub.commit("acme/sd", make_files(NEEDED | OTHERS))
        hub.commit("acme/tiny", make_files(TINY | {"README.md"}))
        hub.commit("acme/lora", make_files({LORA, "other.safetensors"}))
        desk = Desk(hub, tmp_path)
        desk.write_catalog(write_entry("big", extra='tiny_vae = "acme/tiny"\nlora = { source = "acme/lora" }'))
        yield desk


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_only_what_is_needed_is_fetched_and_locked(desk: Desk) -> None:
    said = desk.pull("big")
    assert desk.hub.sent == NEEDED | TINY | {LORA}
    assert "big: licence MIT" in said
    assert f"acme/sd/{UNET}, 300.0 kB" in said
    assert {key: set(value["files"]) for key, value in desk.locked.items()} == {
        "acme/sd": NEEDED,
        "acme/tiny": TINY,
        "acme/lora": {LORA},
    }
    assert desk.locked["acme/sd"]["commit"] == desk.hub.repositories["acme/sd"].branches["main"]
    for name, path in desk.files().items():
        assert desk.locked["acme/sd"]["files"][name] == {"sha256": sha256(path), "size": path.stat().st_size}


def test_a_second_pull_asks_nobody_and_leaves_the_lock_as_it_is(desk: Desk) -> None:
    desk.pull("big")
    before = desk.lock_file.read_bytes()
    desk.hub.forget()
    assert "big: ready" in desk.pull("big")
    assert desk.hub.requests == []
    assert desk.lock_file.read_bytes() == before
    assert "big: ready" in desk.pull("big", HF_HUB_OFFLINE="1")


def test_other_tools_find_the_files(desk: Desk) -> None:
    desk.pull("big")
    program = """
import huggingface_hub as hub
print(hub.hf_hub_download("acme/sd", "unet/config.json", local_files_only=True))
print(hub.scan_cache_dir().warnings)
"""
    run = [sys.executable, "-c", program]
    output = subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ | desk.environment).stdout
    assert output.splitlines() == [str(desk.files()["unet/config.json"]), "[]"]


def test_a_broken_connection_is_gone_on_with(desk: Desk) -> None:
    desk.hub.breaks[UNET] = 100_000
    said = desk.pull("big")
    assert f"{UNET} broke off at 100000 of 300000 bytes" in said
    assert desk.hub.num_sent[UNET] == 300_000
    assert "bytes=100000-" in {request.range for request in desk.hub.requests if request.path.endswith(UNET)}


def test_the_next_pull_goes_on_where_the_last_one_ended(desk: Desk) -> None:
    desk.hub.breaks[UNET] = 100_000
    desk.hub.ends_with_break = True
    result = desk.models("pull", "big")
    assert result.returncode == 1
    assert f"fewstep: acme/sd: {UNET}: {desk.hub.url} answered 500" in result.stderr.splitlines()[-1]
    assert UNET not in desk.files()
    desk.hub.refused.clear()
    desk.pull("big")
    assert desk.hub.num_sent[UNET] == 300_000


@pytest.mark.parametrize(("name", "checksum"), [(UNET, "SHA-256"), ("unet/config.json", "git id")])
def test_bytes_that_are_wrong_are_named_and_thrown_away(desk: Desk, name: str, checksum: str) -> None:
    desk.hub.spoils.add(name)
    result = desk.models("pull", "big")
    assert result.returncode == 1
    assert re.match(f"fewstep: acme/sd: {name} is damaged: its {checksum} is .* thrown", result.stderr.splitlines()[-1])
    assert name not in desk.files()
    wrong = desk.hub.repositories["acme/sd"].commits[desk.hub.repositories["acme/sd"].branches["main"]][name]
    assert not [blob for blob in desk.blobs() if blob.name.startswith(wrong.etag)]
    desk.hub.spoils.clear()
    desk.pull("big")
    assert name in desk.files()


def test_a_file_that_was_damaged_here_is_fetched_again(desk: Desk) -> None:
    desk.pull("big")
    path, content = desk.files()[UNET], desk.files()[UNET].read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    desk.hub.forget()
    assert f"{UNET} was damaged on this machine" in desk.pull("big")
    assert (desk.hub.sent, path.read_bytes()) == ({UNET}, content)


def test_the_lock_keeps_a_commit_until_an_update(desk: Desk, tmp_path: Path) -> None:
    desk.write_catalog(write_entry("big"), write_entry("other"))
    desk.pull("big")
    old = desk.locked["acme/sd"]["commit"]
    new = desk.hub.commit("acme/sd", make_files(NEEDED | OTHERS, version=2))
    elsewhere = {"HF_HOME": str(tmp_path / "elsewhere")}
    assert f"acme/sd is here at {old}" in desk.pull("big", **elsewhere)
    assert desk.locked["acme/sd"]["commit"] == old
    said = desk.pull("big", "--update", **elsewhere)
    assert f"acme/sd: from {old} to {new}" in said
    assert "other uses it too: fewstep models pull other" in said
    assert desk.locked["acme/sd"]["commit"] == new
    assert set(desk.locked["acme/sd"]["files"]) == NEEDED


def test_only_what_the_hub_says_of_a_branch_is_noted_as_its_commit(desk: Desk) -> None:
    desk.pull("big")
    old, new = desk.locked["acme/sd"]["commit"], desk.hub.commit("acme/sd", make_files(NEEDED | OTHERS, version=2))
    ref = desk.root / "hf" / "hub" / "models--acme--sd" / "refs" / "main"
    assert ref.read_text(encoding="utf-8") == old
    ref.write_text(new, encoding="utf-8")  # as another tool leaves it
    desk.pull("big")
    assert ref.read_text(encoding="utf-8") == new
    desk.files()[UNET].unlink()  # now the Hub is asked, for the locked commit
    desk.pull("big")
    assert (desk.locked["acme/sd"]["commit"], ref.read_text(encoding="utf-8")) == (old, new)
    assert [path.name for path in ref.parent.iterdir()] == ["main"]


def test_an_entry_that_asks_for_a_revision(desk: Desk) -> None:
    tagged = desk.hub.commit("acme/sd", make_files(NEEDED, version=3), branch="v3")
    desk.write_catalog(write_entry("big", extra='revision = "v3"'), write_entry("newest"))
    desk.pull("big", "newest")
    assert desk.locked["acme/sd@v3"]["commit"] == tagged
    assert desk.locked["acme/sd"]["commit"] == desk.hub.repositories["acme/sd"].branches["main"]


@pytest.mark.parametrize("name", [UNET, "unet/config.json"])
def test_what_the_lock_says_must_come(desk: Desk, name: str) -> None:
    desk.pull("big")
    lock = json.loads(desk.lock_file.read_text(encoding="utf-8"))
    lock["repositories"]["acme/sd"]["files"][name]["sha256"] = "0" * 64
    desk.lock_file.write_text(json.dumps(lock), encoding="utf-8")
    result = desk.models("pull", "big")
    assert result.returncode == 1
    assert f"acme/sd: {name}" in result.stderr.splitlines()[-1] or name in result.stderr.splitlines()[-1]
    assert name not in desk.files()


def test_offline_without_files(desk: Desk) -> None:
    assert_one_clear_line(
        desk.models("check", "big", HF_HUB_OFFLINE="1"),
        "big: acme/sd is not on this machine",
        "models pull big",
        status=1,
    )
    assert_one_clear_line(desk.models("pull", "big", HF_HUB_OFFLINE="1"), "acme/sd", "HF_HUB_OFFLINE", status=1)
    assert desk.hub.requests == []


def test_offline_with_one_file_missing(desk: Desk) -> None:
    desk.pull("big")
    desk.files()[UNET].unlink()
    result = desk.models("check", "big", HF_HUB_OFFLINE="1")
    assert_one_clear_line(result, f"big: of acme/sd {UNET} is not on this machine", "models pull big", status=1)


def test_an_unknown_repository(desk: Desk) -> None:
    desk.write_catalog(write_entry("big", source="acme/nothing"))
    assert_one_clear_line(desk.models("pull", "big"), "acme/nothing", "no such repository", "HF_TOKEN", status=1)


def test_an_unknown_revision(desk: Desk) -> None:
    desk.write_catalog(write_entry("big", extra='revision = "v9"'))
    assert_one_clear_line(desk.models("pull", "big"), "acme/sd has no revision 'v9'", status=1)


def test_a_repository_without_what_is_needed(desk: Desk) -> None:
    desk.hub.commit("acme/sd", make_files((NEEDED | OTHERS) - {UNET, "unet/diffusion_pytorch_model.safetensors"}))
    words = ("acme/sd lacks unet/*.safetensors", "diffusion_pytorch_model.bin, a pickle, which is never loaded")
    assert_one_clear_line(desk.models("pull", "big"), *words, status=1)


@pytest.mark.parametrize("token", [{}, {"HF_TOKEN": "hf_wrong"}])
def test_a_gated_repository(desk: Desk, token: dict[str, str]) -> None:
    desk.hub.repositories["acme/sd"].is_gated = True
    result = desk.models("pull", "big", **token)
    assert_one_clear_line(result, "acme/sd is gated", f"{desk.hub.url}/acme/sd", "HF_TOKEN", status=1)


def test_a_token_opens_a_gated_repository_and_stays_with_the_hub(desk: Desk) -> None:
    desk.hub.repositories["acme/sd"].is_gated = True
    desk.pull("big", HF_TOKEN=TOKEN)
    assert UNET in desk.files()
    tokens = {
        host: {request.token for request in desk.hub.requests if request.host == host}
        for host in ("127.0.0.1", "localhost")
    }
    assert tokens == {"127.0.0.1": {TOKEN}, "localhost": {None}}


def test_no_network(desk: Desk) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    assert_one_clear_line(desk.models("pull", "big", HF_ENDPOINT=nowhere), "acme/sd: can't reach", nowhere, status=1)


def test_a_hub_that_fails(desk: Desk) -> None:
    desk.hub.status = 500
    assert_one_clear_line(desk.models("pull", "big"), "acme/sd", desk.hub.url, "answered 500", "try again", status=1)


def test_an_endpoint_that_is_no_hub(desk: Desk) -> None:
    desk.hub.status = 200
    assert_one_clear_line(desk.models("pull", "big"), "acme/sd", desk.hub.url, "doesn't answer as a Hub", status=1)


@pytest.mark.parametrize("name", [UNET, "unet/config.json"])
def test_a_checksum_that_is_a_path_touches_nothing(desk: Desk, name: str) -> None:
    mine = desk.root / "mine.txt"
    mine.write_text("mine", encoding="utf-8")
    desk.hub.ids[name] = str(mine)
    assert_one_clear_line(desk.models("pull", "big"), "acme/sd", "doesn't answer as a Hub", name, str(mine), status=1)
    assert mine.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("sha", ["../../../../elsewhere", "main", "A" * 40])
def test_a_commit_that_is_none(desk: Desk, sha: str) -> None:
    desk.hub.sha = sha
    assert_one_clear_line(desk.models("pull", "big"), "acme/sd", "doesn't answer as a Hub", sha, status=1)
    assert desk.hub.sent == set()


def test_a_disk_that_is_too_small(desk: Desk) -> None:
    desk.hub.claims[UNET] = 10**18
    result = desk.models("pull", "big")
    assert result.returncode == 1
    assert re.match(r"fewstep: 10000\d+\.\d GB are to come, and the disk of .* has", result.stderr.splitlines()[-1])
    assert UNET not in desk.hub.sent


def test_a_lock_file_that_cant_be_written_is_said_before_anything_comes(desk: Desk) -> None:
    nowhere = str(desk.root / "nowhere" / "fewstep.lock")
    result = desk.models("pull", "big", FEWSTEP_LOCK_FILE=nowhere)
    assert_one_clear_line(result, "can't write the lock file", nowhere, "FEWSTEP_LOCK_FILE", status=1)
    assert desk.hub.requests == []


@pytest.mark.parametrize(("note", "is_loud"), [("research and non-commercial use only", True), ("be kind", False)])
def test_the_licence_is_said_before_anything_comes(desk: Desk, note: str, is_loud: bool) -> None:
    desk.write_catalog(write_entry("big", extra=f'license_note = "{note}"\nlicense_url = "https://acme.org/terms"'))
    lines = desk.pull("big").splitlines()
    first = f"big: {'NOT FOR COMMERCIAL USE: ' if is_loud else ''}licence MIT · {note}"
    assert lines[:2] == [first, "big: https://acme.org/terms"]


def test_a_terminal_sees_bars(desk: Desk) -> None:
    main, side = pty.openpty()
    run = [sys.executable, "-m", "cli", "models", "pull", "big"]
    environment = {**os.environ, **desk.environment, "COLUMNS": "200", "TERM": "xterm"}
    with subprocess.Popen(run, stdout=side, stderr=side, env=environment) as process:
        os.close(side)
        shown = "".join(read_terminal(main))
    assert process.returncode == 0, shown
    for words in (f"acme/sd/{UNET}", "total", "300.0/300.0 kB", "━━━", "big: ready"):
        assert words in shown


def read_terminal(descriptor: int) -> Iterator[str]:
    """Until the other side has closed it."""
    with os.fdopen(descriptor, "rb", buffering=0) as terminal:
        try:
            while chunk := terminal.read(4096):
                yield chunk.decode(errors="replace")
        except OSError:
            return


def test_a_worker_fetches_what_was_not_pulled_and_needs_no_torch_for_it(desk: Desk) -> None:
    program = """
import sys
from pathlib import Path
from models.catalog import load_catalog
from models.sources import locate
spec = load_catalog(Path(sys.argv[1]))["big"]
print(locate(spec, "source"))
print(locate(spec, "lora").path.name, locate(spec, "tiny_vae").path.name)
print("torch" in sys.modules)
"""
    run = [sys.executable, "-c", program, str(desk.root / "catalog.toml")]
    result = subprocess.run(
        run, capture_output=True, text=True, check=True, cwd=Path.cwd(), env=os.environ | desk.environment
    )
    commits = {name: repository.branches["main"] for name, repository in desk.hub.repositories.items()}
    folder = desk.files()["model_index.json"].parent
    assert result.stdout.splitlines() == [
        f"Place(path={folder!r}, revision='{commits['acme/sd']}')",
        f"{LORA} {commits['acme/tiny']}",
        "False",
    ]
    assert desk.hub.sent == NEEDED | TINY | {LORA}


@pytest.mark.parametrize(("answer", "status"), [(503, 1), (404, 78)])
def test_a_worker_is_started_again_only_where_the_hub_may_come_back(
    desk: Desk, redis_url: str, answer: int, status: int
) -> None:
    desk.hub.status = answer
    settings = {"FEWSTEP_MODELS": "big", "FEWSTEP_REDIS_URL": redis_url, "FEWSTEP_REDIS_PREFIX": desk.root.name}
    result = fewstep("worker", **desk.environment, **settings)
    assert (result.returncode, "acme/sd" in result.stderr) == (status, True), result.stderr


def test_list_and_show_say_what_is_here(desk: Desk) -> None:
    assert re.search(r"big +sd +4 \(1-8\) +32x32 \+ 1 +not here +nothing +MIT", desk.models("list").stdout)
    assert "acme/sd is not on this machine: fewstep models pull big" in desk.models("show", "big").stdout
    desk.pull("big")
    assert re.search(r"big .* here +nothing +MIT", desk.models("list").stdout)
    shown = desk.models("show", "big").stdout
    commit = desk.locked["acme/sd"]["commit"]
    for words in (f"source: acme/sd at {commit}", f"{UNET}  300.0 kB  here", "tiny_vae: acme/tiny at", "MIT"):
        assert words in shown
    desk.files("acme/lora")[LORA].unlink()
    assert "partly here" in desk.models("list").stdout
    assert f"{LORA}  300.0 kB  not here" in desk.models("show", "big").stdout


@pytest.mark.parametrize("arguments", [["list"], ["show", "big"], ["remove", "big"]])
def test_a_damaged_lock_file_hides_nothing(desk: Desk, arguments: list[str]) -> None:
    desk.write_catalog(write_entry("big"), write_entry("other"))
    desk.pull("big")
    desk.lock_file.write_text("{", encoding="utf-8")
    assert_one_clear_line(desk.models(*arguments), str(desk.lock_file), "Invalid JSON", status=1)


def test_remove_keeps_what_another_entry_needs(desk: Desk) -> None:
    big = write_entry("big", extra='tiny_vae = "acme/tiny"\nlora = { source = "acme/lora" }')
    desk.write_catalog(big, write_entry("other", extra='unet = "acme/unet"'))
    desk.hub.commit("acme/unet", make_files(TINY))
    desk.pull("big", "other")
    shared = {name for name in NEEDED if not name.startswith("unet/")}
    sizes = {name: path.stat().st_size for name, path in desk.files().items()}
    freed = sum(size for name, size in sizes.items() if name not in shared)
    for repository in ("acme/tiny", "acme/lora"):
        freed += sum(path.stat().st_size for path in desk.files(repository).values())
    said = desk.models("remove", "big").stderr
    assert said.splitlines() == [f"{freed / 1000:.1f} kB freed"]
    assert set(desk.files()) == shared
    assert (desk.files("acme/tiny"), desk.files("acme/lora"), set(desk.files("acme/unet"))) == ({}, {}, TINY)
    desk.models("remove", "other")
    assert [path.name for path in (desk.root / "hf" / "hub").glob("models--*")] == []
    assert desk.models("remove", "other").stderr.splitlines() == ["0 bytes freed"]


def test_remove_takes_an_unfinished_download_too(desk: Desk) -> None:
    desk.write_catalog(write_entry("big"))
    desk.hub.breaks[UNET] = 100_000
    desk.hub.ends_with_break = True
    assert desk.models("pull", "big").returncode == 1
    desk.models("remove", "big")
    assert desk.blobs() == []


def test_remove_leaves_folders_and_bundled_models(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    desk.write_catalog(write_entry("mine", source=str(tmp_path / "mine"), extra='tiny_vae = "bundled:mini-taesd"'))
    result = desk.models("remove", "mine")
    assert result.stderr.splitlines() == [
        f"mine: {tmp_path / 'mine'} is yours and stays",
        "mine: bundled:mini-taesd ships with fewstep and stays",
        "0 bytes freed",
    ]
    assert (tmp_path / "mine").is_dir()
    assert "nothing to pull, all of it is on this machine" in desk.pull("mine")


@pytest.mark.parametrize("command", ["show", "pull", "check", "remove"])
def test_a_name_that_no_entry_has(desk: Desk, command: str) -> None:
    assert_one_clear_line(desk.models(command, "nothing"), "unknown model 'nothing'", "big")


@pytest.mark.parametrize("command", ["list", "show", "pull", "check", "remove"])
def test_help_teaches(command: str) -> None:
    result = fewstep("models", command, "--help")
    assert (result.returncode, "Example: " in result.stdout) == (0, True)


@pytest.fixture
def real(desk: Desk, tmp_path: Path) -> Desk:
    """With a small model in its catalog that really draws, on the Hub as a whole."""
    small_spec(tmp_path)
    desk.hub.commit("acme/small", read_folder(tmp_path / "sd"))
    desk.hub.commit("acme/tiny", read_folder(tmp_path / "tiny"))
    desk.hub.commit("acme/lora", read_folder(tmp_path / "lora"))
    extra = 'tiny_vae = "acme/tiny"\nlora = { source = "acme/lora" }\nmax_num_images = 1'
    desk.write_catalog(write_entry("small", source="acme/small", extra=extra))
    return desk


RULES = ["default", "guidance 2", "scheduler ddim", "size 48x32"]


def test_check_draws_a_picture_for_each_rule(real: Desk) -> None:
    real.pull("small")
    result = real.models("check", "small", HF_HUB_OFFLINE="1")
    assert (result.returncode, result.stderr) == (0, "")
    for rule in RULES:
        assert re.search(rf"^{rule} +sound +\d+\.\d +(\d+\.\d ){{3}}\d+\.\d +\d+\.\d", result.stdout, re.MULTILINE)


def test_check_says_which_rules_failed(real: Desk, tmp_path: Path) -> None:
    path = next((tmp_path / "sd" / "unet").glob("*.safetensors"))
    save_file({name: torch.full_like(weights, torch.nan) for name, weights in load_file(path).items()}, path)
    real.hub.commit("acme/small", read_folder(tmp_path / "sd"))
    result = real.models("check", "small")
    assert result.returncode == 1
    assert [line for line in result.stderr.splitlines() if line.startswith("fewstep: ")] == [
        f"fewstep: small: {rule}: the network gave latents that are not finite" for rule in RULES
    ]
