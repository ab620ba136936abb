"""Keys and tokens at the live socket, and what an attacker would try."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import openai
import pytest
import websockets

from app.access.key_file import format_entry, new_record
from app.access.keys import RELOAD_S
from app.access.signing import Signer
from app.live.access import PURPOSE, normal_origin
from app.live.protocol import AUTH_PREFIX, SUBPROTOCOL
from tests.app.access.test_auth import BODY, openai_client
from tests.app.conftest import Api, StartApi
from tests.app.keys import Keys, bearer, id_of
from tests.app.live.test_session import Live, closed, go_live

PAGE = "https://shop.example"


def with_credential(credential: str) -> list[str]:
    return [SUBPROTOCOL, AUTH_PREFIX + credential]


async def make_token(api: Api, key: str, **fields: Any) -> str:
    answer = await api.http.post("/v1/live/tokens", json={"origin": PAGE, **fields}, headers=bearer(key))
    assert answer.status_code == 200, answer.text
    token: str = answer.json()["token"]
    return token


async def is_refused(api: Api, **options: Any) -> str:
    """The reason, after checking that nothing but the close came."""
    async with api.connect(**options) as socket:
        with pytest.raises(websockets.ConnectionClosed):
            await socket.recv()
        assert socket.close_code == 4401, socket.close_reason
        return socket.close_reason or ""


# Keys


async def test_a_key_beside_the_subprotocol_opens_and_is_not_echoed(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path) as api, go_live(api, subprotocols=with_credential(key)) as live:
        assert live.socket.subprotocol == SUBPROTOCOL
        assert live.ready["token_expires_in_s"] is None
        await live.generate(1)
        await live.until_final(1)
        assert api.painter.deliveries[0].job.owner == id_of(key)


async def test_a_key_in_the_first_message_opens(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path) as api, api.connect() as socket:
        live = Live(socket)
        await live.send(type="auth", token=key)
        await live.until_message("ready")
        await live.generate(1)
        await live.until_final(1)
        assert api.painter.deliveries[0].job.owner == id_of(key)


@pytest.mark.parametrize("credential", ["x", "fs_", "fs_aaaaaaaaaaaa_x", "a.b", "none"])
async def test_a_wrong_credential_closes(start_api: StartApi, keys: Keys, credential: str) -> None:
    keys.make()
    async with start_api(api_keys_file=keys.path, has_worker=False) as api:
        assert "not" in await is_refused(api, subprotocols=with_credential(credential))
        async with api.connect() as socket:
            await socket.send(json.dumps({"type": "auth", "token": credential}))
            assert (await closed(socket))[0] == 4401
        metrics = (await api.http.get("/metrics")).text
        reason = "invalid_api_key" if credential.startswith("fs_") else "invalid_token"
        assert f'fewstep_rejected_total{{reason="{reason}"}} 2.0' in metrics


@pytest.mark.parametrize(
    "message", ['{"type":"generate","seq":1,"prompt":"x"}', '{"type":"cancel"}', "rubbish", '{"type":"auth"}', "[]"]
)
async def test_another_first_message_closes_and_draws_nothing(start_api: StartApi, keys: Keys, message: str) -> None:
    keys.make()
    async with start_api(api_keys_file=keys.path) as api, api.connect() as socket:
        await socket.send(message)
        code, reason = await closed(socket)
        assert (code, (reason or "").startswith("the first message must be auth")) == (4401, True)
        assert api.painter.deliveries == []


async def test_silence_closes_after_the_limit(start_api: StartApi, keys: Keys) -> None:
    keys.make()
    async with start_api(api_keys_file=keys.path, has_worker=False, live_auth_timeout_s=0.2) as api:
        assert await is_refused(api) == "no auth message came within 0.2 s"


async def test_two_credentials_are_refused(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path, has_worker=False) as api:
        assert "more than one" in await is_refused(api, subprotocols=[*with_credential(key), AUTH_PREFIX + "x"])


@pytest.mark.parametrize("name", ["token", "key", "api_key"])
async def test_a_credential_in_the_url_is_refused_even_if_it_is_right(
    start_api: StartApi, keys: Keys, name: str
) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path, has_worker=False) as api:
        url = f"ws://127.0.0.1:{api.port}/v1/live?{name}={key}"
        for subprotocols in ([SUBPROTOCOL], with_credential(key)):
            async with websockets.connect(url, subprotocols=subprotocols) as socket:  # type: ignore[arg-type]
                assert await closed(socket) == (
                    4401,
                    f"{name} doesn't belong in the URL: see subprotocol fewstep.auth.…",
                )


async def test_a_key_without_the_live_lane_is_refused(start_api: StartApi, keys: Keys) -> None:
    key = keys.make(lanes=["api"])
    async with start_api(api_keys_file=keys.path, has_worker=False) as api:
        assert "live lane" in await is_refused(api, subprotocols=with_credential(key))


async def test_a_key_limited_to_models_gets_its_own_default(start_api: StartApi, keys: Keys) -> None:
    key = keys.make(models=["sd15-lcm"])
    async with start_api(api_keys_file=keys.path) as api, go_live(api, subprotocols=with_credential(key)) as live:
        assert live.ready["model"] == "sd15-lcm"
        await live.generate(1, model="mini-lcm")
        error = (await live.until_message("error"))["error"]
        assert (error["code"], error["param"]) == ("model_not_allowed", "model")


async def test_a_page_elsewhere_may_not_bring_a_key(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path, has_worker=False) as api:
        assert "needs a live token" in await is_refused(api, subprotocols=with_credential(key), origin=PAGE)


async def test_a_page_elsewhere_is_not_anonymous(start_api: StartApi, keys: Keys) -> None:
    keys.make()
    options = {"allow_anonymous": True, "live_auth_timeout_s": 0.2, "has_worker": False}
    async with start_api(api_keys_file=keys.path, **options) as api:
        assert "no auth message" in await is_refused(api, origin=PAGE)
        async with go_live(api, origin=api.url) as live:
            assert live.ready["token_expires_in_s"] is None


async def test_a_revoked_key_ends_its_open_sockets(start_api: StartApi, keys: Keys) -> None:
    key, other = keys.make(), keys.make()
    async with (
        start_api(api_keys_file=keys.path) as api,
        go_live(api, subprotocols=with_credential(key)) as live,
        go_live(api, subprotocols=with_credential(await make_token(api, key)), origin=PAGE) as page,
        go_live(api, subprotocols=with_credential(other)) as stays,
    ):
        revoked_at = time.monotonic()
        keys.revoke(key)
        for ended in (live, page):
            assert await closed(ended.socket) == (4401, "the API key was revoked")
        assert time.monotonic() - revoked_at < RELOAD_S + 10
        await stays.generate(1)
        await stays.until_final(1)


async def test_a_file_that_breaks_ends_no_socket(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path) as api, go_live(api, subprotocols=with_credential(key)) as live:
        keys.path.write_text("[[[")
        api.gateway.keys.reload()
        await live.generate(1)
        await live.until_final(1)


async def test_a_lane_taken_from_a_key_ends_its_sockets(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path) as api, go_live(api, subprotocols=with_credential(key)) as live:
        record = new_record(key, lanes=["api"])
        keys.path.write_text(f'[{id_of(key)}]\nsha256 = "{record.sha256}"\nlanes = ["api"]\n')
        assert (await closed(live.socket))[0] == 4401


async def test_an_anonymous_socket_may_say_who_it_is_before_it_draws(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path, allow_anonymous=True) as api, go_live(api) as live:
        await live.send(type="auth", token=key)
        assert (await live.until_message("authenticated"))["token_expires_in_s"] is None
        await live.generate(1)
        await live.until_final(1)
        assert api.painter.deliveries[0].job.owner == id_of(key)


async def test_a_socket_that_has_drawn_stays_with_its_key(start_api: StartApi, keys: Keys) -> None:
    key, other = keys.make(), keys.make()
    async with start_api(api_keys_file=keys.path) as api, go_live(api, subprotocols=with_credential(key)) as live:
        await live.generate(1)
        await live.until_final(1)
        await live.send(type="auth", token=other)
        code, reason = await closed(live.socket)
        assert (code, "stays with its key" in (reason or "")) == (4401, True)


async def test_without_keys_a_credential_changes_nothing(api: Api) -> None:
    async with go_live(api, subprotocols=with_credential("whatever")) as live:
        await live.send(type="auth", token="whatever")
        await live.until_message("authenticated")
        await live.generate(1)
        await live.until_final(1)
        assert api.painter.deliveries[0].job.owner == "anonymous"


async def test_live_pictures_over_the_rate_are_an_error_with_the_time_to_come_back(
    start_api: StartApi, keys: Keys
) -> None:
    key = keys.make(max_images_per_minute=2, max_requests_per_minute=1)
    async with start_api(api_keys_file=keys.path) as api, go_live(api, subprotocols=with_credential(key)) as live:
        for seq in (1, 2):
            await live.generate(seq)
            await live.until_final(seq)
        await live.generate(3)
        refused = await live.until_message("error")
        assert (refused["seq"], refused["error"]["code"]) == (3, "rate_limit_exceeded")
        assert 40_000 < refused["retry_after_ms"] <= 60_000


async def test_sockets_that_do_not_say_who_they_are_count_too(start_api: StartApi, keys: Keys) -> None:
    keys.make()
    async with (
        start_api(api_keys_file=keys.path, has_worker=False, max_live_connections=1) as api,
        api.connect(),
        api.connect() as second,
    ):
        assert (await closed(second))[0] == 1013


# Tokens


async def test_a_token_opens_a_socket_of_its_origin_only(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path) as api:
        token = await make_token(api, key)
        async with go_live(api, subprotocols=with_credential(token), origin=PAGE) as live:
            assert 290 < live.ready["token_expires_in_s"] <= 300
            await live.generate(1)
            await live.until_final(1)
            assert api.painter.deliveries[0].job.owner == id_of(key)
        for origin in ("https://evil.example", "http://shop.example", f"{PAGE}:444", api.url, "null", None):
            reason = await is_refused(api, subprotocols=with_credential(token), origin=origin)
            assert reason == f"the live token is for pages of {PAGE}"


async def test_a_token_in_the_first_message_opens_too(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path) as api, api.connect(origin=PAGE) as socket:
        live = Live(socket)
        await live.send(type="auth", token=await make_token(api, key))
        assert (await live.until_message("ready"))["token_expires_in_s"] > 0


async def test_the_answer_tells_a_backend_all_it_needs(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path, has_worker=False) as api:
        body = {"origin": "HTTPS://Shop.Example:443/", "ttl_s": 60}
        answer = await api.http.post("/v1/live/tokens", json=body, headers=bearer(key))
    told = answer.json()
    assert told["subprotocols"] == [SUBPROTOCOL, AUTH_PREFIX + told["token"]]
    assert (told["origin"], told["model"], told["expires_in_s"]) == (PAGE, "mini-lcm", 60)
    assert abs(told["expires_at"] - time.time() - 60) < 10
    assert answer.headers["cache-control"] == "no-store"
    assert key not in answer.text


async def test_a_token_draws_with_its_model_only(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path) as api:
        token = await make_token(api, key, model="sd15-lcm")
        async with go_live(api, subprotocols=with_credential(token), origin=PAGE) as live:
            assert live.ready["model"] == "sd15-lcm"
            await live.generate(1, model="mini-lcm")
            assert (await live.until_message("error"))["error"]["code"] == "model_not_allowed"


async def test_a_tokens_rates_hold_within_those_of_its_key(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path) as api:
        wish = {"max_images_per_minute": 1, "user": "ann"}
        first, second = await make_token(api, key, **wish), await make_token(api, key, **wish)
        async with go_live(api, subprotocols=with_credential(first), origin=PAGE) as live:
            await live.generate(1)
            await live.until_final(1)
        async with go_live(api, subprotocols=with_credential(second), origin=PAGE) as live:
            await live.generate(1)
            assert (await live.until_message("error"))["error"]["code"] == "rate_limit_exceeded"


async def test_more_messages_than_the_token_allows_close(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path, has_worker=False) as api:
        token = await make_token(api, key, max_messages_per_s=2)
        async with go_live(api, subprotocols=with_credential(token), origin=PAGE) as live:
            for _ in range(30):
                await live.send(type="auth", token=token)  # which fills no bucket again
            assert await closed(live.socket) == (4429, "more than 2 messages a second")


async def test_an_ended_token_closes_its_socket_and_opens_no_other(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path) as api:
        token = await make_token(api, key, ttl_s=2)
        async with go_live(api, subprotocols=with_credential(token), origin=PAGE) as live:
            assert await closed(live.socket) == (4401, "the live token has expired")
        assert "expired" in await is_refused(api, subprotocols=with_credential(token), origin=PAGE)


async def test_a_fresh_token_keeps_the_socket_open(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path) as api:
        short, long = await make_token(api, key, ttl_s=3), await make_token(api, key, ttl_s=60)
        async with go_live(api, subprotocols=with_credential(short), origin=PAGE) as live:
            await live.send(type="auth", token=long)
            assert (await live.until_message("authenticated"))["token_expires_in_s"] > 50
            assert await live.hears_nothing(live.ready["token_expires_in_s"] + 0.2)
            await live.generate(1)
            await live.until_final(1)
            await live.send(type="auth", token=await make_token(api, key, ttl_s=2))
            await live.until_message("authenticated")
            assert (await closed(live.socket))[0] == 4401


async def test_forged_and_foreign_tokens_are_refused(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path, secret="s" * 40, has_worker=False) as api:
        real = await make_token(api, key)
        payload = Signer("s" * 40).read(PURPOSE, real)
        forged = Signer("t" * 40).sign(PURPOSE, payload, 60)
        misused = Signer("s" * 40).sign("picture link", payload, 60)
        head, _, signature = real.rpartition(".")
        for token in (forged, misused, head, f"{head}.{'A' * 43}", f"{head[:-1]}.{signature}"):
            reason = await is_refused(api, subprotocols=with_credential(token), origin=PAGE)
            assert reason == "the token is not a valid live token"


async def test_all_gateways_on_one_redis_take_each_others_tokens(start_api: StartApi, keys: Keys, prefix: str) -> None:
    key = keys.make()
    options = {"api_keys_file": keys.path, "prefix": prefix, "has_worker": False}
    async with start_api(**options) as one, start_api(**options) as other:
        token = await make_token(one, key)
        async with go_live(other, subprotocols=with_credential(token), origin=PAGE):
            pass


async def test_a_token_is_no_api_key(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path, has_worker=False) as api:
        token = await make_token(api, key)
        async with openai_client(api, token) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        for path, body in (("/v1/generations", BODY), ("/v1/live/tokens", {"origin": PAGE})):
            assert (await api.http.post(path, json=body, headers=bearer(token))).status_code == 401


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "origin", "required"),
        ({"origin": "shop.example"}, "origin", "as in https://example.org"),
        ({"origin": "*"}, "origin", "as in https"),
        ({"origin": "https://*.example"}, "origin", "as in https"),
        ({"origin": "null"}, "origin", "as in https"),
        ({"origin": "https://shop.example/page"}, "origin", "as in https"),
        ({"origin": "https://user@shop.example"}, "origin", "as in https"),
        ({"origin": PAGE, "ttl_s": 121}, "ttl_s", "1 to 120 seconds"),
        ({"origin": PAGE, "ttl_s": 0}, "ttl_s", "greater than or equal to 1"),
        ({"origin": PAGE, "model": "nope"}, "model", "mini-lcm"),
        ({"origin": PAGE, "max_images_per_minute": 0}, "max_images_per_minute", "greater than"),
        ({"origin": PAGE, "rate": 1}, "rate", "unknown field"),
    ],
)
async def test_a_bad_wish_is_named(
    start_api: StartApi, keys: Keys, body: dict[str, Any], param: str, words: str
) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path, has_worker=False, live_token_max_ttl_s=120) as api:
        answer = await api.http.post("/v1/live/tokens", json=body, headers=bearer(key))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (404 if param == "model" else 400, param)
    assert words in error["message"]


async def test_only_keys_with_the_live_lane_make_tokens(start_api: StartApi, keys: Keys) -> None:
    key, narrow = keys.make(lanes=["api"]), keys.make(models=["sd15-lcm"])
    async with start_api(api_keys_file=keys.path, allow_anonymous=True, has_worker=False) as api:

        async def ask(headers: dict[str, str], **fields: Any) -> httpx.Response:
            return await api.http.post("/v1/live/tokens", json={"origin": PAGE, **fields}, headers=headers)

        assert (await ask({})).status_code == 401
        assert (await ask(bearer(key))).json()["error"]["code"] == "lane_not_allowed"
        assert (await ask(bearer(narrow), model="mini-lcm")).status_code == 403
        assert (await ask(bearer(narrow))).json()["model"] == "sd15-lcm"


async def test_keys_of_the_environment_open_the_socket_too(start_api: StartApi) -> None:
    key = "fs_aaaaaaaaaaaa_" + "x" * 43
    entry = format_entry("aaaaaaaaaaaa", new_record(key))
    async with start_api(api_keys=entry, has_worker=False) as api, go_live(api, subprotocols=with_credential(key)):
        pass


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://a.example", "https://a.example"),
        ("https://A.example:443", "https://a.example"),
        ("http://a.example:80/", "http://a.example"),
        ("http://a.example:443", "http://a.example:443"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("ftp://a.example", None),
        ("https://", None),
        ("https://a.example:x", None),
        ("https://a.example?b", None),
        ("https://[", None),
        ("", None),
    ],
)
def test_origins_are_compared_as_browsers_write_them(text: str, origin: str | None) -> None:
    assert normal_origin(text) == origin
