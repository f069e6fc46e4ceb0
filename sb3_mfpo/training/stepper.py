"""Ways to run the same gradient step faster: ``torch.compile``, CUDA graphs, oneDNN matrix products on a CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch as th


@contextmanager
def onednn_matmul(enabled: bool = True) -> Iterator[None]:
    """
    Let oneDNN multiply float32 matrices, within this context.

    The setting allows bfloat16 inside of products. Processors without instructions for it compute in float32 all the same,
    and on those that are not Intel's faster than the library that is used otherwise. See ``onednn_matmul_is_exact``.

    :param enabled: Whether to change anything
    """
    if not enabled:
        yield
        return
    settings = th.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@cache
def onednn_matmul_is_exact() -> bool:
    """
    :return: Whether products within ``onednn_matmul`` keep float32 precision on this processor (else they are rounded to
        bfloat16, 3 significant digits), found by trying
    """
    if not (th.backends.mkldnn.is_available() and hasattr(th.backends.mkldnn, "matmul")):
        return False
    generator = th.Generator().manual_seed(0)
    a, b = th.randn(2, 256, 256, generator=generator)
    with onednn_matmul():
        product = a @ b
    exact = a.double() @ b.double()
    # Float32 products of this size are off by at most 1e-5 of the largest number, bfloat16 ones by 1e-3 and more
    return bool((product - exact).abs().max() < 1e-5 * exact.abs().max())


class _Graph(NamedTuple):
    graph: th.cuda.CUDAGraph
    inputs: Any
    names: list[str]
    values: th.Tensor


class StepRunner:
    """
    Runs an algorithm's gradient steps: as they are, with compiled parts, or from CUDA graphs.

    There is one graph for every combination of settings and of the batch's shapes. The first steps of each run as they are, on
    a stream of their own as capturing requires: they create what is created once (states of optimizers). A graph replays
    what it recorded, so what is no tensor must be among the settings. PyTorch advances its generator at every replay.

    Copies and pickles start anew.

    :param device: The device of the networks
    :param compile_step: Whether to compile, and on a CUDA device to capture
    """

    WARM_UP_STEPS = 3

    def __init__(self, device: th.device, compile_step: bool):
        self.device = device
        self.compile_step = compile_step
        self.captures = compile_step and device.type == "cuda"
        # 1 from the first loss on that is not finite; fused optimizers read it and then skip their steps
        self.failed = th.zeros((), device=device)
        self.learning_rate = th.zeros((), device=device)
        self._functions: dict[str, Callable[..., Any]] = {}
        self.forget_graphs()

    def __reduce__(self) -> tuple[type[StepRunner], tuple[th.device, bool]]:
        return type(self), (self.device, self.compile_step)

    def forget_graphs(self) -> None:
        """To be called when a tensor that steps read or write has been replaced, as loading does with optimizers' states."""
        self._steps: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, _Graph] = {}

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """
        :param function: A method of the algorithm
        :return: Its compiled form, made when first asked for; the method itself if nothing is to be compiled
        """
        if not self.compile_step:
            return function
        name = function.__name__
        if name not in self._functions:
            # Other shapes are compiled anew: symbolic ones would be slower
            self._functions[name] = th.compile(function, dynamic=False)
        return self._functions[name]

    def prepare(self, optimizers: list[th.optim.Optimizer]) -> None:
        """
        Let captured steps read the learning rate from memory and count there. As checkpoints hold these settings, and may come
        from another device, this is for every call of ``train``.

        :param optimizers: Optimizers with the learning rate of now, which they share
        """
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                if "capturable" in group:
                    group["capturable"] = self.captures
                if self.captures:
                    self.learning_rate.fill_(group["lr"])
                    group["lr"] = self.learning_rate

    def defers_checks(self, optimizer: th.optim.Optimizer) -> bool:
        """
        :param optimizer: Whose step is to be taken
        :return: Whether the optimizer itself skips steps down a loss that is not finite. On a CPU looking at the loss costs
            nothing; elsewhere it would wait for the device.
        """
        return self.device.type != "cpu" and all(group.get("fused") for group in optimizer.param_groups)

    def descend(self, loss: th.Tensor, optimizer: th.optim.Optimizer) -> None:
        """
        Take a step down a loss.

        :param loss: A scalar
        :param optimizer: Optimizer of the parameters to change
        """
        if self.defers_checks(optimizer):
            detached = loss.detach()
            # The difference is 0 or NaN: fewer operators than `isfinite`
            self.failed.masked_fill_(detached - detached != 0, 1.0)
            optimizer.found_inf = self.failed  # type: ignore[attr-defined]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def run(
        self,
        step: Callable[..., dict[str, th.Tensor]],
        batch: Any,
        flags: tuple[bool, ...],
        settings: tuple[Hashable, ...],
    ) -> dict[str, th.Tensor]:
        """
        :param step: Function of the batch and the flags; returns scalars by name
        :param batch: A named tuple of tensors, dictionaries of tensors, and None
        :param flags: Further arguments of the step
        :param settings: Everything else that the step depends on and that is no tensor
        :return: What the step returns
        """
        if not self.captures:
            return step(batch, *flags)
        key = (flags, settings, *(tensor.shape for tensor in _tensors(batch)))
        if key not in self._graphs:
            self._steps[key] += 1
            if self._steps[key] <= self.WARM_UP_STEPS:
                return _run_on_side_stream(step, batch, flags)
            self._graphs[key] = _capture(step, batch, flags)
        graph, inputs, names, values = self._graphs[key]
        for static, tensor in zip(_tensors(inputs), _tensors(batch), strict=True):
            static.copy_(tensor)
        graph.replay()
        # The next replay overwrites the values
        return dict(zip(names, values.clone().unbind(), strict=True))


def _run_on_side_stream(
    step: Callable[..., dict[str, th.Tensor]], batch: Any, flags: tuple[bool, ...]
) -> dict[str, th.Tensor]:
    stream = th.cuda.Stream()
    stream.wait_stream(th.cuda.current_stream())
    with th.cuda.stream(stream):
        outputs = step(batch, *flags)
    th.cuda.current_stream().wait_stream(stream)
    return outputs


def _capture(step: Callable[..., dict[str, th.Tensor]], batch: Any, flags: tuple[bool, ...]) -> _Graph:
    inputs = type(batch)(*(_clone(value) for value in batch))
    graph = th.cuda.CUDAGraph()
    with th.cuda.graph(graph):
        outputs = step(inputs, *flags)
        values = th.stack(list(outputs.values()))
    return _Graph(graph, inputs, list(outputs), values)


def _tensors(batch: Any) -> Iterator[th.Tensor]:
    for value in batch:
        if isinstance(value, dict):
            yield from value.values()
        elif value is not None:
            yield value


def _clone(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: tensor.clone() for key, tensor in value.items()}
    return None if value is None else value.clone()
