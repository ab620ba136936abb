"""Between the decoder and the door: no picture of a model with a safety checker leaves the engine unseen by it."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from workers.engine.outputs import Blocked, EngineOutput, Finished, GenerationFailed
from workers.engine.runner import ModelRunner

logger = logging.getLogger(__name__)


def withhold_blocked(runners: Mapping[str, ModelRunner], outputs: Iterable[EngineOutput]) -> list[EngineOutput]:
    """The outputs, with finished requests judged, those of one model in one batch."""
    passed: list[EngineOutput] = []
    unseen: defaultdict[str, list[Finished]] = defaultdict(list)
    for output in outputs:
        if isinstance(output, Finished) and output.request.spec.safety_checker is not None:
            unseen[output.request.model].append(output)
        else:
            passed.append(output)
    for model, finished in unseen.items():
        passed += _judge(runners[model], finished)
    return passed


def _judge(runner: ModelRunner, finished: Sequence[Finished]) -> list[EngineOutput]:
    """A batch that can't be judged is judged one by one; what can't be judged alone has failed."""
    started_s = time.perf_counter()
    try:
        verdicts = iter(runner.check([image for output in finished for image in output.pixels]))
    except Exception as error:  # noqa: BLE001 - whatever it raises, the others go on and nothing leaves unseen
        runner.ensure_device()
        if len(finished) > 1:
            logger.warning("a check of %d requests failed (%r): they are checked one by one", len(finished), error)
            return [judged for output in finished for judged in _judge(runner, [output])]
        logger.error("request %s: can't check its pictures: %r", finished[0].request.request_id, error)
        return [GenerationFailed(finished[0].request, error)]
    check_ms = (time.perf_counter() - started_s) * 1000
    outputs: list[EngineOutput] = []
    for output in finished:
        output.request.check_ms = check_ms
        num_blocked = sum(islice(verdicts, len(output.pixels)))
        outputs.append(Blocked(output.request, num_blocked) if num_blocked else output)
    return outputs
