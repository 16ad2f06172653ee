"""Traces a function with ``make_fx`` and compiles it with Inductor for a CPU, without guards.

``torch.compile`` checks its inputs at each call; here the caller sees to it that they are like the traced ones. What
the function closes over is not copied, weights in oneDNN's own order included. It is no part of what is compiled, so
that Inductor's cache on disk serves another process, and other weights of the same shapes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from megatron_ds.errors import ConfigError

_UNCHECKED = ("size_asserts", "alignment_asserts", "assert_indirect_indexing")
_PACKED_WEIGHTS = {
    "mkldnn._linear_pointwise.default": 1,
    "mkldnn._linear_pointwise.binary": 2,
    "onednn.qlinear_pointwise.default": 3,
}
"""oneDNN's products, and which of their arguments is the weight."""


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
    with torch.inference_mode(False), torch.no_grad(), _no_collections():
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
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

    graph, weights = _weights_as_inputs(graph)
    inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    settings = {"compile_threads": 1, **dict.fromkeys(_UNCHECKED, False)}
    # Without a tracing context Inductor does not look into its cache.
    context = tracing(TracingContext(inputs[0].fake_mode))
    try:
        with (
            torch.no_grad(), _no_collections(), config.patch(settings), context, _packed_weights_as_inputs(),
            _strides_found_once(),
        ):  # fmt: skip
            compiled = compile_fx_inner(graph, inputs, cpp_wrapper=in_one_call)
    except (InductorError, CppCompileError, InvalidCxxCompiler) as error:  # bare ones of what is in the cache
        cause = error.inner_exception if isinstance(error, InductorError) else error
        if isinstance(cause, InvalidCxxCompiler):
            raise ConfigError(f"compiling the model needs a C++ compiler: install g++, or use {without}") from None
        if isinstance(cause, CppCompileError) and " " in torch.__file__:
            raise ConfigError(
                f"torch stands in {torch.__path__[0]!r}, and its compiler takes no path with a space: move it, or use "
                f"{without}"
            ) from None
        raise
    return lambda *args: compiled([*args, *weights])


def _weights_as_inputs(graph: GraphModule) -> tuple[GraphModule, list[Tensor]]:
    """The graph with the tensors that it holds as further inputs, and these tensors."""
    inputs = graph.graph.find_nodes(op="placeholder")
    mode, last = inputs[0].meta["val"].fake_mode, inputs[-1]
    weights: dict[Tensor, Node] = {}  # by identity
    for node in graph.graph.find_nodes(op="get_attr"):
        weight = getattr(graph, node.target)
        if weight not in weights:
            with graph.graph.inserting_after(last):
                weights[weight] = last = graph.graph.placeholder(f"weight_{len(weights)}")
            like = torch.empty(weight.shape, dtype=weight.dtype) if weight.is_mkldnn else weight.detach()
            last.meta["val"] = mode.from_tensor(like, static_shapes=True)
        node.replace_all_uses_with(weights[weight])
        graph.graph.erase_node(node)
    return GraphModule({}, graph.graph), list(weights)


@contextmanager
def _no_collections() -> Iterator[None]:
    """Python's garbage collector pauses: nodes and expressions live to the end, and going over them takes a fifth."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def _strides_found_once() -> Iterator[None]:
    """Let Inductor keep every stride that it has found in an index, until it has compiled a graph.

    By itself it keeps 128, and decoding has more in a layer, so that they were found anew for each of equal layers.
    """
    from torch._inductor.codegen import cpp

    before = cpp.stride_at_vec_range
    cpp.stride_at_vec_range = cache(before.__wrapped__)
    try:
        yield
    finally:
        cpp.stride_at_vec_range = before


@contextmanager
def _packed_weights_as_inputs() -> Iterator[None]:
    """Let Inductor lower oneDNN's products with packed weights that are inputs.

    Its rules assert that they are constants, and read no more of them than shape and dtype.
    """
    from torch._inductor import mkldnn_lowerings  # noqa: F401  which adds the rules
    from torch._inductor.lowering import lowerings
    from torch._inductor.virtualized import V

    def with_constant(rule: Callable[..., Any], weight: int) -> Callable[..., Any]:
        def lower(*args: Any, **kwargs: Any) -> Any:
            constants, name = V.graph.constants, args[weight].get_name()
            if name in constants:
                return rule(*args, **kwargs)
            constants[name] = torch.empty(0)
            try:
                return rule(*args, **kwargs)
            finally:
                del constants[name]

        return lower

    named = {str(op): op for op in lowerings}
    before = {named[name]: lowerings[named[name]] for name in _PACKED_WEIGHTS if name in named}
    lowerings.update({op: with_constant(rule, _PACKED_WEIGHTS[str(op)]) for op, rule in before.items()})
    try:
        yield
    finally:
        lowerings.update(before)
