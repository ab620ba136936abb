from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.catalog import ModelSpec
from models.loading import load_pipeline
from models.pipeline import FewStepPipeline
from tests.small_models import small_spec
from workers.engine import Engine
from workers.engine.runner import ModelRunner


@pytest.fixture(scope="session")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    root: Path = tmp_path_factory.mktemp("small")
    return small_spec(root)


@pytest.fixture(scope="session")
def pipeline(spec: ModelSpec) -> FewStepPipeline:
    return load_pipeline(spec, torch.device("cpu"), torch.float32)


@pytest.fixture
def engine(pipeline: FewStepPipeline) -> Engine:
    return Engine({"small": ModelRunner(pipeline)})
