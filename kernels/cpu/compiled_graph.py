"""Traces a function with ``make_fx`` and compiles it with Inductor for a CPU, without guards.

``torch.compile`` checks its inputs at each call; here the caller sees to it that they are like the traced ones. What
the function closes over is not copied, weights in oneDNN's own order included.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from megatron_ds.errors import ConfigError

_UNCHECKED = ("size_asserts", "alignment_asserts", "assert_indirect_indexing")


def record(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], sizes: Container[int] = ()
) -> GraphModule:
    """Trace ``function`` on ``inputs``: its operators as a graph, functionalized (writes in place only at the end).

    The graph gives a tuple, also of one tensor.

    Args:
        sizes: of the inputs that may be others later, 1 included; those that are equal stay equal.

    Raises:
        ConfigError: what ``function`` does depends on such a size; one that equals a size of a weight may look so.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    # By default a size that may change is taken for two at least.
    mode = FakeTensorMode(shape_env=ShapeEnv(specialize_zero_one=False), allow_non_fake_inputs=True)

    def fake(x: Tensor) -> Tensor:
        kinds = [DimDynamic.DUCK if size in sizes else DimDynamic.STATIC for size in x.shape]
        return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))

    def outputs(*args: Tensor) -> tuple[Tensor, ...]:
        found = function(*args)
        return found if isinstance(found, tuple) else (found,)

    functional = torch.func.functionalize(outputs, remove="mutations")
    with torch.inference_mode(False), torch.no_grad():
        fakes = [fake(x) for x in inputs]
        with mode:
            graph = make_fx(functional, select_decomp_table())(*fakes)
    graph.graph.eliminate_dead_code()
    free: list[Any] = [size for of_input in fakes for size in of_input.shape if isinstance(size, torch.SymInt)]
    if any(size.node.expr.is_number for size in free):
        raise ConfigError("the model computes otherwise for other numbers of tokens; use enforce_eager=True")
    return graph


def compile_graph(graph: GraphModule, in_one_call: bool = False) -> Callable[..., Tensor]:
    """:func:`compile_outputs` of a graph with one output, which the compiled one gives by itself."""
    compiled = compile_outputs(graph, in_one_call)
    return lambda *args: compiled(*args)[0]


def compile_outputs(
    graph: GraphModule, in_one_call: bool = False, without: str = "enforce_eager=True"
) -> Callable[..., tuple[Tensor, ...]]:
    """Compile what :func:`record` gave, which takes seconds.

    Args:
        in_one_call: what calls the loops and products is C++, too; it takes seconds longer to compile.
        without: the setting under which nothing is compiled, for the error.

    Raises:
        ConfigError: there is no C++ compiler, or it does not find torch.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

    try:
        with torch.no_grad(), config.patch({"compile_threads": 1, **dict.fromkeys(_UNCHECKED, False)}):
            inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
            compiled = compile_fx_inner(graph, inputs, cpp_wrapper=in_one_call)
    except InductorError as error:
        if isinstance(error.inner_exception, InvalidCxxCompiler):
            raise ConfigError(f"compiling the model needs a C++ compiler: install g++, or use {without}") from None
        if isinstance(error.inner_exception, CppCompileError) and " " in torch.__file__:
            raise ConfigError(
                f"torch stands in {torch.__path__[0]!r}, and its compiler takes no path with a space: move it, or use "
                f"{without}"
            ) from None
        raise
    return lambda *args: compiled(list(args))
