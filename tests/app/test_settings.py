from __future__ import annotations

import socket

import pytest

from app.main import bind, create_app
from app.settings import GatewaySettings, is_loopback, open_loopback
from broker.settings import SettingsError


def test_the_message_names_key_and_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_PORT", "eighty")
    with pytest.raises(SettingsError, match=r"^FEWSTEP_PORT='eighty': .*integer") as caught:
        GatewaySettings.load()
    assert "\n" not in str(caught.value)


def test_environment_and_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_MAX_DEPTH", "7")
    monkeypatch.setenv("FEWSTEP_ALLOWED_ORIGINS", "https://a.example, https://b.example/")
    settings = GatewaySettings.load(port=81)
    assert (settings.max_depth, settings.port) == (7, 81)
    assert settings.allowed_origins == ("https://a.example", "https://b.example")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.3.2.1", "LocalHost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    assert open_loopback(GatewaySettings.load(host=host)).allow_anonymous


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_an_open_host_is_not_opened_by_itself(host: str) -> None:
    assert not is_loopback(host)
    assert not open_loopback(GatewaySettings.load(host=host)).allow_anonymous


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_gateway_without_a_word_on_who_may_come_does_not_start(host: str) -> None:
    with pytest.raises(SettingsError, match=f"fewstep keys create.*FEWSTEP_ALLOW_ANONYMOUS=1.*{host}"):
        create_app(GatewaySettings.load(host=host))
    create_app(GatewaySettings.load(host=host, allow_anonymous=True))
    create_app(GatewaySettings.load(host=host, api_keys=f"{'a' * 12}:{'0' * 64}"))


def test_what_somebody_said_of_anonymous_callers_stays() -> None:
    assert not open_loopback(GatewaySettings.load(allow_anonymous=False)).allow_anonymous
    assert not open_loopback(GatewaySettings.load(api_keys=f"{'a' * 12}:{'0' * 64}")).allow_anonymous


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEYS", "API_KEYS_FILE", "SECRET"):
        monkeypatch.setenv(f"FEWSTEP_{name}", "")
    settings = GatewaySettings.load()
    assert (settings.has_keys, settings.secret) == (False, None)


def test_a_secret_is_never_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_SECRET", "too short")
    with pytest.raises(SettingsError, match=r"^FEWSTEP_SECRET=\(hidden\): .*32") as caught:
        GatewaySettings.load()
    assert "too short" not in str(caught.value)
    assert "s" * 32 not in repr(GatewaySettings.load(secret="s" * 32))


def test_an_unknown_default_model_does_not_start() -> None:
    with pytest.raises(SettingsError, match=r"FEWSTEP_DEFAULT_MODEL='nope'.*mini-lcm"):
        create_app(GatewaySettings.load(default_model="nope", allow_anonymous=True))


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"can't listen on 127.0.0.1:{port}.*in use.*FEWSTEP_PORT"):
            bind(GatewaySettings.load(port=port))


def test_live_sockets_are_connections() -> None:
    settings = GatewaySettings.load(max_live_connections=3000, allow_anonymous=True)
    with pytest.raises(
        SettingsError, match=r"FEWSTEP_MAX_LIVE_CONNECTIONS=3000: .*FEWSTEP_MAX_CONNECTIONS allows 2000"
    ):
        create_app(settings)
