"""The worker that both programs are made of."""

from __future__ import annotations

from dataclasses import replace

from workers.engine.runner import ModelRunner
from workers.worker import Worker


class ThreadWorker(Worker):
    """The shipped worker, but that a batch may grow to the model's limit.

    How far it pays is measured at each start and differs from one to the next, where two sizes are about as good.
    """

    def _welcome(self, runner: ModelRunner) -> None:
        assert runner.warm_model is not None, "a runner is welcomed once it is warm"
        sizes = tuple(replace(costs, max_rows=runner.warm_model.max_batch_size) for costs in runner.warm_model.sizes)
        runner.warm_model = replace(runner.warm_model, sizes=sizes)
        super()._welcome(runner)
