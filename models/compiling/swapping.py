"""A network that is swapped for its compiled form as soon as that is there and proven."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from concurrent.futures import Future

import torch
from torch import Tensor

from models.compiling.compiler import CompileError, Compiler, Package
from models.compiling.packages import load
from models.compiling.recipe import MAX_ROWS, Blueprint, Recipe, Run, Sizes, sizes_of
from models.networks import first_line

logger = logging.getLogger(__name__)


class Swapped:
    """Calls `usual` until a package for the inputs' sizes is there and has computed the same, and the package from then
    on. `usual` serves whatever goes wrong, and batches that are too large for a package.

    `wrap` makes of a compiled network what the device runs fast. `forget` hears of inputs for whose sizes `usual`
    needs to keep nothing any more. `model` is for the log. Calls come from one thread.
    """

    def __init__(
        self,
        usual: Run,
        blueprint: Blueprint,
        compiler: Compiler,
        *,
        model: str,
        device: torch.device,
        num_threads: int = 1,
        wrap: Callable[[Run], Run] = lambda run: run,
        forget: Callable[[tuple[Tensor, ...]], None] = lambda _: None,
    ) -> None:
        self._usual, self._blueprint, self._compiler = usual, blueprint, compiler
        self._model, self._device, self._num_threads = model, device, num_threads
        self._forget = forget
        self._known: set[Sizes] = set()
        self._awaited: dict[Sizes, Future[Package]] = {}
        self._packages: dict[Sizes, Run] = {}
        self._fast = wrap(lambda *inputs: self._packages[sizes_of(inputs)](*inputs))

    def __call__(self, *inputs: Tensor) -> Tensor:
        sizes = sizes_of(inputs)
        if len(inputs[0]) > MAX_ROWS:
            return self._usual(*inputs)
        if sizes in self._packages:
            return self._fast(*inputs)
        if sizes not in self._known:
            self._ask(sizes)
        output = self._usual(*inputs)
        if sizes in self._awaited and self._awaited[sizes].done():
            self._take(sizes, self._awaited.pop(sizes), inputs, output)
        return output

    def _ask(self, sizes: Sizes) -> None:
        self._known.add(sizes)
        answer = self._compiler.ask(Recipe.of(self._blueprint, sizes, self._device))
        answer.add_done_callback(lambda answer: self._tell_failure(sizes, answer.exception()))
        self._awaited[sizes] = answer

    def _take(self, sizes: Sizes, answer: Future[Package], inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if answer.exception() is not None:
            return
        package = answer.result()
        try:
            run = load(package, self._blueprint.network, self._device, self._num_threads)
            with torch.inference_mode():
                check(run(*inputs), output)
        except (CompileError, RuntimeError, OSError) as error:
            error.add_note(f"remove {package.path} to have it compiled anew")
            self._tell_failure(sizes, error)
            return
        self._packages[sizes] = run
        self._forget(inputs)
        how = "from the cache" if package.seconds is None else f"after {package.seconds:.0f} s of compiling"
        logger.info("%s: compiled network for %s in use, %s", self._model, _describe(sizes), how)

    def _tell_failure(self, sizes: Sizes, error: BaseException | None) -> None:
        if isinstance(error, Exception):
            notes = "; ".join([first_line(error), *getattr(error, "__notes__", [])])
            logger.error("%s goes on without a compiled network for %s: %s", self._model, _describe(sizes), notes)


def check(output: Tensor, usual: Tensor) -> None:
    """Raises CompileError where the outputs share less than half of the digits that their format has."""
    difference = _norm(output - usual) / max(_norm(usual), torch.finfo(usual.dtype).tiny)
    allowed = math.sqrt(torch.finfo(usual.dtype).eps)
    if not difference <= allowed:  # nor if it isn't a number
        raise CompileError(
            f"its output differs from the usual one by {difference:.2g} of it, and {allowed:.2g} is allowed"
        )


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.float()))


def _describe(sizes: Sizes) -> str:
    (_, *sides), dtype = sizes[0]
    return f"inputs of {'x'.join(map(str, sides))} in {dtype}"
