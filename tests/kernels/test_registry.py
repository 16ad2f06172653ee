"""Which implementation an op takes, what overrides it, and that nothing is chosen in silence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_ds.errors import ConfigError
from megatron_ds.kernels import registry
from megatron_ds.kernels.activation import GATED, gated
from megatron_ds.kernels.cross_entropy import CROSS_ENTROPY
from megatron_ds.kernels.norm import NORM, layer_norm, rms_norm
from megatron_ds.kernels.registry import report, use


def tensor(device: str, dtype: torch.dtype) -> torch.Tensor:
    """Of any device, without having one."""
    with FakeTensorMode():
        return torch.empty(2, 8, device=device, dtype=dtype)


@pytest.mark.parametrize("op", registry.all_ops(), ids=lambda op: op.name)
def test_the_rule(op: registry.Op) -> None:
    half_or_single = set(op.dtypes)
    assert torch.float64 not in half_or_single and torch.bfloat16 in half_or_single
    for device in ("cpu", "cuda"):
        for dtype in (torch.float64, *op.dtypes):
            want = "triton" if device == "cuda" and dtype in half_or_single else "reference"
            assert op.choose(tensor(device, dtype)) == want, (device, dtype)
            with use("reference"):
                assert op.choose(tensor(device, dtype)) == "reference"


def test_every_module_is_listed_and_every_op_has_a_name_of_its_own() -> None:
    names = [op.name for op in registry.all_ops()]
    assert len(names) == len(set(names)) >= 7
    assert {"norm", "dropout_add", "gated", "bias_gelu", "softmax", "cross_entropy", "rotary", "split_heads"} <= set(
        names
    )


def test_contexts_nest_and_end() -> None:
    x = tensor("cuda", torch.float32)

    def chosen() -> tuple[str, str]:
        return NORM.choose(x), GATED.choose(x)

    assert chosen() == ("triton", "triton")
    with use({"norm": "reference"}):
        assert chosen() == ("reference", "triton")
        with use({"gated": "reference"}):
            assert chosen() == ("reference", "reference")
            with use("auto"):
                assert chosen() == ("triton", "triton")
        assert chosen() == ("reference", "triton")
    with pytest.raises(RuntimeError, match="inside"), use("reference"):
        raise RuntimeError("inside")
    assert chosen() == ("triton", "triton")


def test_a_compiler_gets_what_it_can_fuse() -> None:
    """And keeps the others whole, such as the loss."""

    def chosen(x: torch.Tensor) -> tuple[str, ...]:
        return tuple(op.choose(x) for op in (NORM, GATED, CROSS_ENTROPY))

    x = torch.empty(2, 8, device="meta")
    with registry.meta_as("cuda"):
        assert chosen(x) == ("triton",) * 3
        compiled = torch.compile(chosen, backend="eager", fullgraph=True)
        assert compiled(x) == ("reference", "reference", "triton")
        with use("triton"):
            assert compiled(x) == ("triton",) * 3
    assert chosen(x) == ("reference",) * 3


def test_the_choice_is_reported_with_its_reason() -> None:
    lines = {choice.op: str(choice) for choice in report("cuda", torch.bfloat16)}
    assert lines["norm"] == "norm: triton (the device is cuda, the dtype torch.bfloat16)"
    assert {c.implementation for c in report("cuda", torch.float64)} == {"reference"}
    assert str(report("cpu", torch.float32)[0]) == "norm: reference (the device is cpu)"
    with use({"norm": "reference"}):
        assert {c.op: c.reason for c in report("cuda", torch.float32)}["norm"] == "as selected"
    assert [c.op for c in report("cpu", torch.float32)] == [op.name for op in registry.all_ops()]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("tritn", "kernels='tritn' is not one of auto, reference, triton; did you mean 'triton'?"),
        ({"norm": "cuda"}, "kernels.norm='cuda' is not one of"),
        ({"nrom": "triton"}, "kernels.nrom: there is no such op.*did you mean 'norm'?"),
    ],
)
def test_what_does_not_exist_is_an_error(selection: str | dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")), use(selection):
        pass
    assert NORM.choose(tensor("cuda", torch.float32)) == "triton"


def test_what_cannot_run_is_an_error_and_no_fallback() -> None:
    x, w = torch.ones(2, 8), torch.ones(8)
    with use({"norm": "triton"}):
        with pytest.raises(ConfigError, match=r"kernels.norm='triton' cannot compute in torch.float64.*'reference'"):
            rms_norm(x.double(), w.double(), 1e-5)
        gated(x)  # the others are as before
    pytest.importorskip("triton", reason="without Triton the error is another one, tested below")
    with use("triton"), pytest.raises(ConfigError, match=r"cannot run on a cpu tensor without TRITON_INTERPRET=1"):
        layer_norm(x, w, w, 1e-5)


def test_a_run_is_refused_before_it_starts() -> None:
    registry.check_runnable("cpu", torch.float64)
    registry.check_runnable("cpu", torch.bfloat16)
    with use("reference"):
        registry.check_runnable("cuda", torch.bfloat16)
    with use("triton"):
        with pytest.raises(ConfigError, match=r"cannot compute in torch\.float64"):
            registry.check_runnable("cuda", torch.float64)
        with pytest.raises(ConfigError, match=r"TRITON_INTERPRET=1|needs Triton"):
            registry.check_runnable("cpu", torch.float32)


def test_the_configuration_chooses(tmp_path: Path) -> None:
    """``kernels = "triton"`` reaches the ops of a run, which is refused on a CPU before it makes anything."""
    script = Path(__file__).parents[2] / "examples" / "pretrain_gpt.py"
    sizes = "--data.synthetic --model.num-layers 1 --model.hidden-size 16 --model.num-heads 2 --train.sequence-length 8"
    command = [sys.executable, str(script), *sizes.split(), "--device", "cpu", "--output", str(tmp_path / "run")]
    done = subprocess.run([*command, "--kernels", "triton"], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("error: kernels.norm='triton' "), done.stderr
    assert not (tmp_path / "run").exists()


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # an import of it raises ModuleNotFoundError
import torch
from megatron_ds.errors import ConfigError
from megatron_ds.kernels import registry
from megatron_ds.kernels.norm import rms_norm
x, w = torch.ones(2, 8), torch.ones(8)
rms_norm(x, w, 1e-5)
print([str(choice) for choice in registry.report("cuda", torch.float32)][0])
try:
    with registry.use("triton"):
        rms_norm(x, w, 1e-5)
except ConfigError as error:
    print(error)
"""


def test_without_triton_the_references_run_and_the_twins_say_what_to_do() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("norm: triton")
    assert lines[1] == (
        "kernels.norm='triton' needs Triton: pip install triton, or choose plain torch: kernels='reference'"
    )


def test_an_op_without_autograd_kernel_is_traced_by_compile() -> None:
    """On a CPU the reference is part of the graph: nothing of the registry is left in it, and no break."""
    nodes: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    x, w = torch.randn(2, 8), torch.ones(8)
    got = torch.compile(lambda x: gated(rms_norm(x, w, 1e-5)), backend=backend, fullgraph=True)(x)
    assert torch.equal(got, gated(rms_norm(x, w, 1e-5)))
    assert nodes and not any("megatron_ds" in node for node in nodes), nodes
