"""What all tests share: one real Redis per process, a prefix of its own per test, and one running service."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests run side by side

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from broker.embedded import EmbeddedRedis
from broker.redis_broker import RedisBroker
from tests.service import Service, start_service


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """An embedded server for all tests of this process."""
    with EmbeddedRedis() as server:
        yield server.url


@pytest.fixture
def prefix() -> str:
    return f"test-{uuid4().hex}"


@pytest.fixture
async def broker(redis_url: str, prefix: str) -> AsyncIterator[RedisBroker]:
    """The gateway's broker, and the worker's where one process is enough."""
    async with RedisBroker(redis_url, prefix=prefix) as broker:
        yield broker


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A real `fewstep serve` with the bundled model."""
    log: Path = tmp_path_factory.mktemp("service") / "serve.log"
    service = start_service(log)
    yield service
    service.stop()


@pytest.fixture(scope="session")
def service_url(service: Service) -> str:
    return service.url
