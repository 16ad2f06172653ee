"""Traces a function with ``make_fx`` and compiles it with Inductor for a CPU, without guards.

``torch.compile`` checks its inputs at each call; here the caller sees to it that they are like the traced ones. What
the function closes over is not copied, weights in oneDNN's own order included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from megatron_ds.errors import ConfigError


def record(function: Callable[..., Tensor], inputs: Sequence[Tensor], dynamic: bool) -> GraphModule:
    """Trace ``function`` on ``inputs``: its operators as a graph, functionalized (without writes in place).

    Args:
        dynamic: sizes of the inputs but 1 may be others later; sizes that are equal stay equal.

    Raises:
        ConfigError: what ``function`` does depends on such a size; one that equals a size of a weight may look so.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    functional = torch.func.functionalize(lambda *args: (function(*args),), remove="mutations")
    mode: Literal["symbolic", "fake"] = "symbolic" if dynamic else "fake"
    with torch.inference_mode(False), torch.no_grad():
        graph = make_fx(functional, select_decomp_table(), mode, _allow_non_fake_inputs=True)(*inputs)
    graph.graph.eliminate_dead_code()
    if dynamic and any(size.node.expr.is_number for size in _sizes(graph) if isinstance(size, torch.SymInt)):
        raise ConfigError("the model computes otherwise for other numbers of tokens; use enforce_eager=True")
    return graph


def _inputs(graph: GraphModule) -> list[Tensor]:
    return [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]


def _sizes(graph: GraphModule) -> Iterable[int | torch.SymInt]:
    return (size for of_input in _inputs(graph) for size in of_input.shape)


def compile_graph(graph: GraphModule) -> Callable[..., Tensor]:
    """Compile what :func:`record` gave, which takes seconds.

    Raises:
        ConfigError: there is no C++ compiler.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    try:
        with torch.no_grad(), config.patch(size_asserts=False, alignment_asserts=False, compile_threads=1):
            compiled = compile_fx_inner(graph, _inputs(graph))
    except InductorError as error:
        if not isinstance(error.inner_exception, InvalidCxxCompiler):
            raise
        raise ConfigError("compiling the model needs a C++ compiler: install g++, or use enforce_eager=True") from None
    return lambda *args: compiled(list(args))[0]
