"""The Python client against a real gateway: the fixtures are those of the gateway's own tests."""

from tests.app.conftest import api, keys, start_api

__all__ = ["api", "keys", "start_api"]
