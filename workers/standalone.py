"""A worker's engine with one model and without a queue, for commands that draw on their own."""

from __future__ import annotations

from models.catalog import ModelSpec
from models.loading import default_dtype, load_pipeline
from workers.engine import Engine
from workers.engine.calibration import batch_sizes
from workers.engine.runner import ModelRunner
from workers.settings import WorkerSettings
from workers.worker import make_compiler, place


def load_engine(spec: ModelSpec, settings: WorkerSettings) -> Engine:
    """Loads the model as a worker of these settings does. Raises LoadError, SettingsError."""
    device, dtype = place(settings)
    pipeline = load_pipeline(
        spec,
        device,
        default_dtype(device, spec) if settings.dtype == "auto" else dtype,
        cuda_graphs=settings.cuda_graphs,
        lock_file=settings.lock_file,
        max_loras=settings.max_loras,
        compiler=make_compiler(settings),  # never started: what was compiled before is used
    )
    padded = batch_sizes(spec, device) if device.type == "cuda" else None
    return Engine({spec.name: ModelRunner(pipeline, padded)})
