"""What test_interpreter.py runs under Triton's interpreter. Every case has tiny grids: a program takes 1.7 ms."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from interpreted_adaln import ADALN
from interpreted_benchmark import benchmark_checks, benchmark_measures
from interpreted_heads import HEADS
from interpreted_inputs import LAYOUTS, keys, normal, sliced, strided, table
from interpreted_layouts import UNUSUAL
from interpreted_library import LIBRARY
from interpreted_models import whole_model
from interpreted_paged import PAGED
from interpreted_rows import ROWS
from interpreter_worker import TOLERANCE, Canaries, close, compare
from torch import Tensor

from megatron_ds.errors import ConfigError
from megatron_ds.kernels import registry
from megatron_ds.kernels.activation import bias_gelu, gated
from megatron_ds.kernels.adamw import AdamWNumbers, adamw_
from megatron_ds.kernels.cross_entropy import LossTerms, logit_gradient, token_losses, token_statistics
from megatron_ds.kernels.dropout import dropout_add, keep_mask
from megatron_ds.kernels.norm import add_norm, layer_norm, rms_norm
from megatron_ds.kernels.rotary import rotary
from megatron_ds.kernels.softmax import scaled_masked_softmax
from megatron_ds.kernels.square_sum import square_sum
from megatron_ds.zero.main_grad import MainGradient

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CASES: dict[str, Callable[[], None]] = {}


def add(name: str, function: Callable[..., Any], *inputs: Callable[[], Tensor | None], **options: Any) -> None:
    CASES[name] = lambda: compare(function, [make() for make in inputs], **options)


def nothing() -> None:
    return None


# --- norms ------------------------------------------------------------------------------------------------------

# Beyond 8192 columns, and in half precision in each of the four parts that a row is taken in.
LONG = {torch.float32: 9001, torch.bfloat16: 12345}
for dtype in DTYPES:
    for kind, columns in product(("layernorm", "rmsnorm"), (37, LONG.get(dtype))):
        for layout, make in LAYOUTS.items():
            if layout and (columns != 37 or dtype != torch.float32):
                continue
            if columns is None:
                continue
            x = partial(make, 3, 3, columns, dtype=dtype)
            w = partial(normal, columns, dtype=dtype)
            if kind == "layernorm":
                add(f"layer_norm {columns} {dtype}{layout}", partial(layer_norm, eps=1e-5), x, w, w)
            else:
                add(f"rms_norm {columns} {dtype}{layout}", partial(rms_norm, eps=1e-5), x, w)
            bias = w if kind == "layernorm" else nothing

            def fused(x: Tensor, r: Tensor, w: Tensor, b: Tensor | None, k: Tensor, kind: str, p: float) -> Any:
                return add_norm(x, r, w, b, 1e-5, kind=kind, p=p, row_keys=k)

            for p in (0.0, 0.3):
                if columns == 37 or p:
                    add(
                        f"add_norm {kind} {columns} {dtype} p={p}{layout}",
                        partial(fused, kind=kind, p=p),
                        x, x, w, bias, partial(keys, 3, 3),
                    )  # fmt: skip
for kind, bias, columns in (
    ("layernorm", True, 37),
    ("rmsnorm", False, 37),
    ("layernorm", True, 4100),
    ("layernorm", True, 12345),
):
    # The bias of the layer before, whose gradient is the column sums of what that layer gets.
    def seam(x: Tensor, r: Tensor, w: Tensor, b: Tensor | None, x_bias: Tensor, k: Tensor, kind: str, p: float) -> Any:
        return add_norm(x, r, w, b, 1e-5, kind=kind, p=p, row_keys=k, x_bias=x_bias)

    half = torch.bfloat16 if columns > 37 else torch.float16
    x, w = partial(normal, 7, 1, columns, dtype=half), partial(normal, columns, dtype=half)
    for p in (0.0, 0.3) if columns == 37 else (0.3,):
        inputs = x, x, w, w if bias else nothing, w, partial(keys, 7, 1)
        add(f"add_norm {kind} {columns} bias before p={p}", partial(seam, kind=kind, p=p), *inputs)


def main_gradients() -> None:
    """A kernel adds to main gradients itself: the first write overwrites, later ones add, and each is counted."""
    written: list[str] = []
    results = []
    for implementation in ("triton", "reference"):
        torch.manual_seed(0)
        x, r = (normal(5, 12).requires_grad_() for _ in range(2))
        parameters = [normal(12).requires_grad_() for _ in range(3)]
        if implementation == "triton":
            for name, parameter in zip(("weight", "bias", "x_bias"), parameters):
                parameter.main_grad = main = MainGradient(
                    name, lambda main: None, lambda main: written.append(main.name)
                )
                main.view = torch.full((12,), torch.nan)
        w, b, x_bias = parameters
        with registry.use(implementation):
            for _ in range(2):
                add_norm(x, r, w, b, 1e-5, x_bias=x_bias)[0].square().sum().backward()
        results.append([p.main_grad.view if implementation == "triton" else p.grad for p in parameters])
        if implementation == "triton":
            assert all(p.grad is None for p in parameters)
    assert written == ["weight", "bias", "x_bias"] * 2, written
    for got, want in zip(*results):
        close("main gradient", got, want.double(), 1e-5)


CASES["norm main gradients"] = main_gradients
# More rows than the programs of a persistent backward pass hold at once; rows that a program's tile does not fill.
add(
    "layer_norm many rows", partial(layer_norm, eps=1e-5), lambda: normal(1061, 8), lambda: normal(8), lambda: normal(8)
)
add("rms_norm two columns", partial(rms_norm, eps=1e-5), lambda: normal(5, 2), lambda: normal(2))
add("layer_norm no bias", partial(layer_norm, bias=None, eps=1e-5), lambda: normal(5, 16), lambda: normal(16))
add(
    "layer_norm zero rows", partial(layer_norm, eps=1e-5), lambda: normal(0, 16), lambda: normal(16), lambda: normal(16)
)
add("rms_norm zero input", partial(rms_norm, eps=1e-5), lambda: torch.zeros(2, 16), lambda: normal(16))
# A mean that is 1000 times the deviation: one pass over squares would lose 6 of fp32's 7 digits.
for columns in (64, 8500):
    add(
        f"layer_norm far from zero {columns}",
        partial(layer_norm, eps=1e-5),
        partial(lambda n: normal(2, n) + 1000.0, columns),
        partial(normal, columns),
        partial(normal, columns),
        tolerance=2e-4,  # fp32 itself resolves the inputs to 6e-5 of their deviation
    )
add(
    "rms_norm large half",
    partial(rms_norm, eps=1e-5),
    lambda: normal(2, 64, dtype=torch.float16, scale=1e4),
    lambda: normal(64, dtype=torch.float16),
)
add(
    "layer_norm fp32 weights",
    partial(layer_norm, eps=1e-5),
    lambda: normal(3, 40, dtype=torch.bfloat16),
    lambda: normal(40),
    lambda: normal(40),
)

# --- activations ------------------------------------------------------------------------------------------------

for dtype in DTYPES:
    for activation in ("silu", "gelu", "gelu_tanh"):
        act = partial(gated, activation=activation)
        add(f"gated {activation} {dtype}", act, partial(normal, 3, 2, 2 * 37, dtype=dtype))
    for approximate in ("none", "tanh"):
        act = partial(bias_gelu, approximate=approximate)
        add(
            f"bias_gelu {approximate} {dtype}",
            act,
            partial(normal, 3, 37, dtype=dtype),
            partial(normal, 37, dtype=dtype),
        )
    # The matmul has added the bias; its gradient is the column sums, over several tiles of rows and strips of columns.
    act = partial(bias_gelu, approximate="tanh", added=True)
    x, bias_of_up = partial(normal, 40, 300, dtype=dtype), partial(normal, 300, dtype=dtype)
    add(f"bias_gelu added {dtype}", act, x, bias_of_up)
add("gated two blocks", gated, lambda: normal(2, 2 * 1100))
add("gated strided", gated, lambda: strided(3, 2, 10))
add("gated sliced", gated, lambda: sliced(3, 2, 10))
add("gated extremes", gated, lambda: torch.tensor([[-1e4, 1e4, -200.0, 90.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]))
add("gated zero rows", gated, lambda: normal(0, 2, 8))
add("bias_gelu no bias", bias_gelu, lambda: sliced(3, 37), nothing)
add("bias_gelu extremes", bias_gelu, lambda: torch.tensor([[-1e4, -50.0, 0.0, 50.0, 1e4]]), lambda: torch.zeros(5))
add("bias_gelu zero rows", bias_gelu, lambda: normal(0, 8), lambda: normal(8))

# --- sums of squares --------------------------------------------------------------------------------------------


def squares(count: int) -> None:
    canaries = Canaries()
    x = canaries.around(normal(count))
    with registry.use("triton"), canaries.around_allocations():
        got = square_sum(x)
    canaries.check()
    want = x.double().square().sum()
    close("sum of squares", got, want, 1e-7)
    close("the reference", square_sum(x), want, 1e-7)


for count in (0, 5, 2048, 70_000):
    CASES[f"square sum {count}"] = partial(squares, count)

# --- dropout ----------------------------------------------------------------------------------------------------


def drop(x: Tensor, residual: Tensor | None, row_keys: Tensor) -> Tensor:
    return dropout_add(x, residual, 0.4, row_keys)


for dtype in DTYPES:
    for layout, make in LAYOUTS.items():
        x = partial(make, 3, 2, 37, dtype=dtype)
        add(f"dropout_add {dtype}{layout}", drop, x, x, partial(keys, 3, 2))
add("dropout alone", drop, lambda: normal(2, 2, 1100), nothing, lambda: keys(2, 2))
add("dropout zero rows", drop, lambda: normal(0, 8), lambda: normal(0, 8), lambda: keys(0))


def same_decisions() -> None:
    """Bit for bit the reference's, for keys and columns that overflow 32 bits many times, and for extreme p."""
    row_keys = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 123456789], dtype=torch.int32)
    for p in (1e-9, 0.1, 0.5, 0.999999):
        with registry.use("triton"):
            out = dropout_add(torch.ones(6, 2500), None, p, row_keys)
        assert torch.equal(out != 0, keep_mask(row_keys, torch.arange(2500), p)), p


CASES["dropout decisions"] = same_decisions

# --- softmax ----------------------------------------------------------------------------------------------------


def attend(x: Tensor, mask: Tensor | None, slopes: Tensor | None, causal: bool) -> Tensor:
    return scaled_masked_softmax(x, 0.7, causal=causal, mask=mask, slopes=slopes)


def seen(*shape: int) -> Tensor:
    return torch.rand(shape) > 0.3


for dtype in DTYPES:
    for q, k in ((5, 5), (3, 37), (1, 4500), (5, 3)):
        for causal in (False, True):
            x = partial(normal, 2, 2, q, k, dtype=dtype, scale=3.0)
            add(
                f"softmax {q}x{k} {dtype} causal={causal}",
                partial(attend, causal=causal),
                x,
                partial(seen, 2, 1, 1, k) if q == 3 or k > 100 else nothing,
                partial(normal, 2) if q != 5 else nothing,
                no_gradient=[2],
            )
add(
    "softmax full mask",
    partial(attend, causal=True),
    lambda: strided(2, 2, 4, 9),
    lambda: seen(2, 2, 4, 9),
    lambda: normal(2),
    no_gradient=[2],
)
add(
    "softmax masked rows",
    partial(attend, causal=False),
    lambda: normal(2, 1, 3, 7),
    lambda: torch.zeros(3, 1, dtype=torch.bool),
    nothing,
)
add("softmax overflow-prone", partial(attend, causal=False), lambda: normal(1, 1, 3, 7, scale=1e4), nothing, nothing)
add(
    "softmax overflow-prone half",
    partial(attend, causal=False),
    lambda: normal(1, 1, 3, 7, dtype=torch.float16, scale=1e4),
    nothing,
    nothing,
)
# Rows that end in each of the four quarters, see no key, or are shorter than the three first.
for dtype, q, k in ((torch.float32, 21, 18), (torch.bfloat16, 18, 18), (torch.float16, 3, 23)):
    x = partial(normal, 1, 2, q, k, dtype=dtype)
    add(f"softmax quarters {q}x{k}", partial(attend, causal=True), x, nothing, nothing)
    add(
        f"softmax quarters {q}x{k} masked",
        partial(attend, causal=True),
        x,
        lambda q=q, k=k: torch.rand(1, 1, q, k) > 0.3,
        lambda: torch.tensor([0.5, 0.25]),
        no_gradient=[1, 2],
    )
add("softmax zero rows", partial(attend, causal=True), lambda: normal(0, 2, 3, 7), nothing, nothing)


def infinite_scores() -> None:
    """-inf in the scores themselves, a whole row of it too."""
    x = normal(1, 1, 3, 6)
    x[..., 0, 2:] = x[..., 1, :] = float("-inf")
    for long in (x, torch.cat((x, torch.full((1, 1, 3, 4200), float("-inf"))), dim=-1)):
        with registry.use("triton"):
            out = scaled_masked_softmax(long)
        assert torch.equal(out[0, 0, 1], torch.zeros_like(out[0, 0, 1]))
        close("softmax", out, scaled_masked_softmax(long.double()), 1e-6)


def nothing_above_the_diagonal() -> None:
    """What lies there is NaN, and neither pass sees it."""
    for q, k in ((6, 6), (2, 4400)):
        above = torch.ones(q, k, dtype=torch.bool).triu(k - q + 1)
        x = normal(1, 1, q, k)
        with registry.use("triton"):
            want = scaled_masked_softmax(x, causal=True)
            hidden = x.masked_fill(above, float("nan")).requires_grad_()
            out = scaled_masked_softmax(hidden, causal=True)
            seed = normal(1, 1, q, k).masked_fill(above, float("nan"))
            (gradient,) = torch.autograd.grad(out, hidden, seed)
        assert torch.equal(out, want) and not out[..., above].any()
        assert gradient.isfinite().all() and not gradient[..., above].any()


CASES["softmax infinite scores"] = infinite_scores
CASES["softmax above the diagonal"] = nothing_above_the_diagonal

# --- cross entropy ----------------------------------------------------------------------------------------------


def cross_entropy(
    dtype: torch.dtype,
    tokens: int,
    columns: int,
    smoothing: float,
    z_loss: float,
    scale: float = 3.0,
    gap: int = 0,
    rising: bool = False,
) -> None:
    logits = normal(tokens, columns + gap, dtype=dtype, scale=scale)[:, :columns]
    if rising:  # every tile has a new maximum
        logits = logits.sort(dim=1).values
    # The label is another rank's, on either side; the first, the last, one inside.
    target = torch.tensor([-1, columns, 0, columns - 1, columns // 2, -(2**40)])[:tokens]
    mask = torch.arange(tokens) % 3 > 0
    canaries = Canaries()
    own = canaries.around(logits)
    with registry.use("triton"), canaries.around_allocations():
        stats, scratch = token_statistics(own, canaries.around(target), want_sum=True)
    want, exact = token_statistics(logits.double(), target, want_sum=True)
    for name, a, b in zip(("maximum", "sum", "target", "sum of logits"), stats, want):
        if tokens:
            close(name, a, b, 1e-5)
    lse = want[0] + want[1].log()
    seed = torch.tensor(1.5, dtype=torch.float64) if smoothing else None
    terms = LossTerms(smoothing, z_loss, vocab_size=3 * columns)
    with registry.use("triton"), canaries.around_allocations():
        gradient = logit_gradient(scratch, stats[0], lse.float(), target, mask, seed, terms)
    assert gradient.data_ptr() == own.data_ptr(), "the gradient is to be written in place"
    expected = logit_gradient(exact, want[0], lse, target, mask, seed, terms)
    canaries.check()
    if tokens:
        close("gradient", gradient, expected, TOLERANCE[dtype])


for dtype in DTYPES:
    for columns in (1, 37, 4096, 4133):
        CASES[f"cross entropy {columns} {dtype}"] = partial(cross_entropy, dtype, 6, columns, 0.1, 0.01)
CASES["cross entropy plain"] = partial(cross_entropy, torch.float32, 5, 37, 0.0, 0.0)
CASES["cross entropy rows with a gap"] = partial(cross_entropy, torch.float32, 5, 37, 0.1, 0.0, gap=5)
CASES["cross entropy overflow-prone"] = partial(cross_entropy, torch.float32, 5, 4133, 0.1, 0.0, scale=1e4)
CASES["cross entropy rising"] = partial(cross_entropy, torch.float32, 5, 4133, 0.1, 0.0, rising=True)
CASES["cross entropy zero rows"] = partial(cross_entropy, torch.float32, 0, 37, 0.1, 0.0)


def losses_at_once(dtype: torch.dtype, columns: int, smoothing: float) -> None:
    """Losses and gradient by one kernel: more tokens than programs, tokens that do not count, labels anywhere."""
    tokens = 7
    canaries = Canaries()
    logits = (3 * normal(tokens, columns + 3)).to(dtype)[:, :columns]
    target = torch.tensor([0, columns - 1, 1, -5, columns // 2, columns + 9, 3])
    mask = torch.tensor([True, True, False, False, True, False, True])
    seed = torch.tensor(0.25) if smoothing else None
    terms = LossTerms(smoothing, 1e-2 if smoothing else 0.0, vocab_size=columns)
    want, expected = token_losses(logits.double(), target, mask, seed, terms)
    own = canaries.around(logits)
    own[2] = torch.inf  # of a token that does not count
    with registry.use("triton"), canaries.around_allocations():
        got, gradient = token_losses(own, target, mask, seed, terms)
    canaries.check()
    assert gradient.data_ptr() == own.data_ptr()
    close("losses", got, want, 1e-5)
    close("gradient", gradient, expected, TOLERANCE[dtype])
    leaf = logits.double().requires_grad_()
    torch_loss = torch.nn.functional.cross_entropy(
        leaf[mask], target[mask], label_smoothing=smoothing, reduction="sum"
    ) + terms.z_loss * leaf[mask].logsumexp(1).square().sum()  # fmt: skip
    close("torch's loss", want.sum(), torch_loss.detach(), 1e-12)
    torch_loss.backward()
    assert leaf.grad is not None
    close("torch's gradient", expected, leaf.grad * (1.0 if seed is None else seed), 1e-12)


for dtype in DTYPES:
    CASES[f"losses at once {dtype}"] = partial(losses_at_once, dtype, 4096 + 37, 0.1)
CASES["losses at once plain"] = partial(losses_at_once, torch.float32, 40, 0.0)


def masked_logits() -> None:
    """-inf logits have no probability, and no gradient but the smoothing's."""
    logits = normal(2, 5000)
    logits[0, 7:] = float("-inf")
    logits[1, :4500] = float("-inf")
    target = torch.tensor([3, 4999])
    with registry.use("triton"):
        stats, scratch = token_statistics(logits.clone(), target, want_sum=False)
        lse = stats[0] + stats[1].log()
        mask = torch.ones(2, dtype=torch.bool)
        gradient = logit_gradient(scratch, stats[0], lse, target, mask, None, LossTerms(0.0, 0.0, vocab_size=5000))
    close("lse", lse, logits.double().logsumexp(1), 1e-6)
    want = logits.double().softmax(1) - torch.nn.functional.one_hot(target, 5000)
    close("gradient", gradient, want, 1e-6)


CASES["cross entropy -inf logits"] = masked_logits


def adamw(low: torch.dtype | None, factor: float) -> None:
    """More than one program, the last one ragged; two weights in half precision were written by somebody else."""
    master, gradient, first, second = (normal(3001) for _ in range(4))
    second = second.square()
    half = None if low is None else master.to(low)
    if half is not None:
        half[[7, 3000]] = torch.tensor([2.0, -0.5], dtype=low)
    numbers = AdamWNumbers(0.1, 0.9, 0.95, 1e-6, 0.2, 3)
    canaries, scale = Canaries(), torch.tensor(factor)
    own = [canaries.around(t) for t in (master, gradient, first, second)]
    own_half = None if half is None else canaries.around(half)
    exact = [t.double() for t in (master, gradient, first, second)]
    exact_half = None if half is None else half.clone()
    with registry.use("triton"):
        adamw_(*own, own_half, scale, numbers)
    with registry.use("reference"):
        adamw_(*exact, exact_half, scale.double(), numbers)
    canaries.check()
    for name, a, b in zip(("master", "gradient", "first moment", "second moment"), own, exact):
        close(name, a, b, 2e-6)
    if math.isnan(factor):
        assert torch.equal(own[0], master) and torch.equal(own[2], first), "nothing is updated"
        assert own_half is None or torch.equal(own_half, half)
    elif own_half is not None and low is not None:
        assert torch.equal(own_half, own[0].to(low))


for kind in (None, torch.float16):  # the interpreter does not round to bf16 as a GPU does
    CASES[f"adamw with weights in {kind}"] = partial(adamw, kind, 0.5)
    CASES[f"adamw with weights in {kind}, times NaN"] = partial(adamw, kind, math.nan)

# --- rotary -----------------------------------------------------------------------------------------------------


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, offset: int) -> Any:
    """Queries and keys as attention takes them: views of one fused tensor ``[s, b, g, q + 2, d]``."""
    s, b, _, _, d = qkv.shape
    q = qkv[..., :-2, :].reshape(s, b, -1, d)
    return rotary(q, qkv[..., -2, :], cos, sin, interleaved=interleaved, offset=offset)


def rotary_case(dtype: torch.dtype, d: int, size: int, interleaved: bool, offset: int, batch: int, groups: int) -> None:
    cos, sin = table(3 + offset, batch, size, dtype)
    turn = partial(rotate, interleaved=interleaved, offset=offset)
    compare(turn, [normal(3, 2, groups, 5, d, dtype=dtype), cos, sin], no_gradient=[1, 2])


for dtype in DTYPES:
    for interleaved in (False, True):
        name = f"rotary {dtype} interleaved={interleaved}"
        CASES[name] = partial(rotary_case, dtype, 8, 8, interleaved, 0, 2, 2)
        CASES[f"{name} partial"] = partial(rotary_case, dtype, 10, 6, interleaved, 2, 1, 1)
CASES["rotary many heads"] = partial(rotary_case, torch.float32, 4, 4, False, 1, 2, 7)
CASES["rotary ragged rest"] = partial(rotary_case, torch.float32, 11, 6, False, 0, 2, 1)
CASES["rotary odd head dim"] = partial(rotary_case, torch.float32, 9, 6, False, 0, 2, 1)

CASES |= UNUSUAL | LIBRARY | HEADS | ADALN | ROWS | PAGED
CASES["Llama"] = partial(
    whole_model, position="rope", norm="rmsnorm", activation="swiglu", bias=False, kv_heads=2, qk_norm=True
)
CASES["BERT"] = partial(
    whole_model, family="bert", embedding_norm=True, token_types=2, attention_dropout=0.2, hidden_dropout=0.1
)
CASES["GPT-2"] = partial(whole_model, hidden_dropout=0.2, attention_dropout=0.2, max_positions=8)


CASES["benchmark"] = benchmark_checks
CASES["benchmark measures"] = benchmark_measures


def second_derivatives() -> None:
    """Of a sum of squares of the gradient: right, or refused."""
    w, table_ = normal(8), table(3, 1, 4, torch.float32)
    right: list[Callable[[Tensor], Tensor]] = [
        lambda x: drop(x, x, torch.arange(3, dtype=torch.int32)),
        lambda x: torch.cat(rotary(x.view(3, 1, 2, 4), x.view(3, 1, 2, 4), *(t.to(x.dtype) for t in table_)), dim=2),
    ]
    refused: list[Callable[[Tensor], Tensor]] = [
        lambda x: layer_norm(x, w, w, 1e-5),
        lambda x: add_norm(x, x, w, None, 1e-5, kind="rmsnorm")[1],
        gated,
        lambda x: bias_gelu(x, w),
        lambda x: scaled_masked_softmax(x.view(1, 1, 3, 8), causal=True),
    ]

    def penalty(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x.sin()).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    x = normal(3, 8)
    for function in right:
        with registry.use("triton"):
            got = penalty(function, x)
        close("second derivative", got, penalty(function, x.double()), 1e-5)
    with registry.use("triton"):
        for function in refused:
            try:
                penalty(function, x)
            except RuntimeError as error:
                assert "has no second derivative" in str(error), error
            else:
                raise AssertionError("a second derivative came out of an operator that has none")


CASES["second derivatives"] = second_derivatives


def refusals() -> None:
    with registry.use("triton"):
        try:
            rms_norm(normal(2, 4).double(), normal(4).double(), 1e-5)
        except ConfigError as error:
            assert "kernels.norm" in str(error) and "torch.float64" in str(error)
        else:
            raise AssertionError("float64 was computed by a kernel of fp32")


CASES["float64 is refused"] = refusals
