"""The prompt check of an operator, on a running gateway: functions below are named in its settings."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI

from app.main import create_app
from app.policy import PromptRequest
from app.settings import GatewaySettings
from broker.settings import SettingsError
from models.catalog import CATALOG_PATH
from tests.app.conftest import Api, StartApi
from tests.app.live.test_session import go_live
from tests.app.test_process import gateway

HERE = "tests.app.test_policy"
asked: list[PromptRequest] = []
threads: list[threading.Thread] = []


def block_apples(request: PromptRequest) -> str | None:
    asked.append(request)
    threads.append(threading.current_thread())
    return "no apples, please" if "apple" in request.prompt else None


async def block_apples_asynchronously(request: PromptRequest) -> str | None:
    await asyncio.sleep(0)
    return block_apples(request)


class Moderator:
    async def __call__(self, request: PromptRequest) -> str | None:
        return await block_apples_asynchronously(request)


moderate = Moderator()


def raises(_: PromptRequest) -> str | None:
    raise KeyError("a secret of the operator")


def hangs(_: PromptRequest) -> str | None:
    time.sleep(0.5)
    return None


async def hangs_asynchronously(_: PromptRequest) -> str | None:
    await asyncio.sleep(30)
    return None


def says_true(_: PromptRequest) -> bool:
    return True


def says_nothing(_: PromptRequest) -> str | None:
    return ""


def takes_two(_: PromptRequest, __: int) -> None: ...


@pytest.fixture(autouse=True)
def _nobody_was_asked() -> None:
    asked.clear()
    threads.clear()


async def count(api: Api, metric: str) -> float:
    lines = (await api.http.get("/metrics")).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(metric))


@pytest.mark.parametrize("name", ["block_apples", "block_apples_asynchronously", "moderate"])
async def test_a_blocked_prompt_never_gets_into_the_queue(start_api: StartApi, name: str) -> None:
    async with start_api(prompt_check=f"{HERE}:{name}") as api:
        blocked = await api.http.post("/v1/generations", json={"prompt": "a red apple"})
        allowed = await api.http.post("/v1/generations", json={"prompt": "a pear", "negative_prompt": "apples"})
        assert blocked.status_code == 400
        assert blocked.json()["error"] == {
            "message": "the prompt is blocked: no apples, please",
            "type": "invalid_request_error",
            "param": None,
            "code": "content_policy_violation",
        }
        assert allowed.json()["state"] == "completed"
        assert [delivery.job.params.prompt for delivery in api.painter.deliveries] == ["a pear"]
        assert await count(api, 'fewstep_rejected_total{reason="content_policy_violation"}') == 1
        assert await count(api, 'fewstep_prompt_check_seconds_count{result="blocked"}') == 1
        assert await count(api, 'fewstep_prompt_check_seconds_count{result="allowed"}') == 1
    assert asked[1] == PromptRequest("a pear", "apples", "mini-lcm", "anonymous", None, "api")
    assert (threading.main_thread() in threads) == (name != "block_apples"), "a synchronous one has its own thread"


async def test_the_official_client_raises_bad_request_and_the_check_hears_of_its_user(start_api: StartApi) -> None:
    async with (
        start_api(prompt_check=f"{HERE}:block_apples") as api,
        AsyncOpenAI(api_key="unused", base_url=f"{api.url}/v1") as client,
    ):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="no apples, please") as blocked:
                await client.images.generate(prompt="an apple", user="mary", stream=stream)
            assert blocked.value.code == "content_policy_violation"
        await client.images.generate(prompt="a pear", user="mary", extra_body={"safety_identifier": "3f2a"})
        await client.images.generate(prompt="a pear")
    assert [request.user for request in asked] == ["mary", "mary", "3f2a", None]


async def test_a_live_socket_is_told_and_goes_on(start_api: StartApi) -> None:
    async with start_api(prompt_check=f"{HERE}:block_apples") as api, go_live(api) as live:
        await live.generate(1, "an apple")
        message = await live.until_message("error")
        assert (message["seq"], message["error"]["code"]) == (1, "content_policy_violation")
        assert "retry_after_ms" not in message
        await live.generate(2, "a pear", refine={"after_ms": 1, "num_inference_steps": 8})
        await live.until_final(2, refined=True)
        assert await count(api, 'fewstep_rejected_total{reason="content_policy_violation"}') == 1
    assert [request.lane for request in asked] == ["live"] * 3


@pytest.mark.parametrize("name", ["raises", "hangs", "hangs_asynchronously", "says_true", "says_nothing"])
async def test_without_an_answer_nothing_gets_in(
    start_api: StartApi, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with start_api(prompt_check=f"{HERE}:{name}", prompt_check_timeout_s=0.1) as api:
        answer = await api.http.post("/v1/generations", json={"prompt": "a red apple"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "prompt_check_failed")
        assert answer.headers["retry-after-ms"] == "1000"
        assert "secret" not in answer.text
        assert api.painter.deliveries == []
        assert await count(api, 'fewstep_prompt_check_seconds_count{result="failed"}') == 1
    [record] = [record for record in caplog.records if record.name == "app.policy"]
    assert answer.headers["x-request-id"] in record.getMessage()
    assert record.exc_info


async def test_a_model_can_be_left_out(start_api: StartApi, tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.toml"
    text = CATALOG_PATH.read_text(encoding="utf-8").replace("[mini-lcm]\n", "[mini-lcm]\ncheck_prompts = false\n")
    catalog.write_text(text, encoding="utf-8")
    async with start_api(prompt_check=f"{HERE}:block_apples", catalog=catalog) as api:
        assert (await api.http.post("/v1/generations", json={"prompt": "an apple"})).status_code == 200
    assert asked == []


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", "it must be package.module:function"),
        ("tests.app.test_policy", "it must be package.module:function"),
        (
            "nowhere.to_be_found:check",
            "can't import nowhere.to_be_found: ModuleNotFoundError: No module named 'nowhere'",
        ),
        (f"{HERE}:block_pears", f"{HERE} has no function block_pears"),
        (f"{HERE}:HERE", f"{HERE} has no function HERE"),
        (f"{HERE}:takes_two", "must take one argument, the PromptRequest"),
    ],
)
def test_a_wrong_name_fails_the_start(path: str, reason: str) -> None:
    with pytest.raises(SettingsError) as error:
        create_app(GatewaySettings.load(prompt_check=path, allow_anonymous=True))
    assert str(error.value).startswith(f"FEWSTEP_PROMPT_CHECK={path!r}: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_name_is_one_line_of_the_process() -> None:
    with gateway(FEWSTEP_PROMPT_CHECK="nowhere:check") as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 78
    assert output.startswith("fewstep: FEWSTEP_PROMPT_CHECK='nowhere:check': can't import nowhere")
    assert output.count("\n") == 1
