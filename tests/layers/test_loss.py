"""The fused, vocabulary-parallel loss against ``F.cross_entropy`` on whole logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, product
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from megatron_ds import comm
from megatron_ds.kernels import registry
from megatron_ds.kernels.cpu import onednn
from megatron_ds.layers import loss
from megatron_ds.layers.loss import cross_entropy, linear_cross_entropy
from megatron_ds.mesh import Axis, Mesh, MeshShape
from megatron_ds.testing import device_of_rank, run_ranks
from megatron_ds.zero.main_grad import MainGradient

WIDTH = 8
SEED_GRADIENT = 0.37


@dataclass(frozen=True)
class Case:
    vocab: int = 50
    padded: int = 72
    sequence: int = 12
    batch: int = 2
    smoothing: float = 0.0
    z_loss: float = 0.0
    masked: float = 0.3
    sequence_parallel: bool = False
    chunk_bytes: int | None = None
    scale: float = 1.0
    dtype: torch.dtype = torch.float64
    biased: bool = False
    softcap: float | None = None


def bias_of(case: Case) -> Tensor:
    """``[padded]``, rounded to the case's dtype, with garbage in its padding too."""
    return torch.linspace(-1.0, 2.0, case.padded, dtype=torch.float64).to(case.dtype)


def data(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden ``[s, b, h]``, weight ``[padded, h]`` with garbage in its padding rows, labels, mask."""
    g = torch.Generator().manual_seed(case.sequence)
    hidden = torch.randn(case.sequence, case.batch, WIDTH, generator=g, dtype=torch.float64) * case.scale
    weight = torch.randn(case.padded, WIDTH, generator=g, dtype=torch.float64)
    weight[case.vocab :] = 100.0
    labels = torch.randint(case.vocab, hidden.shape[:2], generator=g)
    mask = torch.rand(hidden.shape[:2], generator=g) >= case.masked
    labels = labels.masked_fill(~mask, -100)  # what does not count may be anything
    return hidden.to(case.dtype), weight.to(case.dtype), labels, mask


def expected(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Loss and gradients from whole logits, in float64."""
    hidden, weight, labels, mask = data(case)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    bias = bias_of(case).double().requires_grad_(case.biased)
    logits = (hidden @ weight[: case.vocab].T)[mask]
    if case.biased:
        logits = logits + bias[: case.vocab]
    if case.softcap is not None:
        logits = case.softcap * (logits / case.softcap).tanh()
    total = F.cross_entropy(logits, labels[mask], reduction="sum", label_smoothing=case.smoothing)
    total = total + case.z_loss * logits.logsumexp(-1).square().sum()
    (total * SEED_GRADIENT).backward()
    assert hidden.grad is not None and weight.grad is not None
    return total.detach(), hidden.grad, weight.grad, bias.grad


def main_gradient(weight: Tensor, value: float, written: bool) -> Tensor:
    """Give ``weight`` a main gradient that holds ``value``; its buffer."""
    main_grad = MainGradient("weight", lambda main_grad: None, lambda main_grad: None)
    main_grad.view = torch.full_like(weight, value, dtype=torch.promote_types(weight.dtype, torch.float32))
    main_grad.written = written
    weight.main_grad = main_grad  # type: ignore[attr-defined]
    return main_grad.view


def computed(case: Case, tp: Axis, seeded: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """This rank's loss, and gradients of its hidden states, of its rows and of their biases.

    ``seeded``: the loss is told what comes in the backward pass, the rows have a main gradient, and the gradient of the
    hidden states is written over them.
    """
    hidden, weight, labels, mask = data(case)
    rows = case.padded // tp.size
    part = case.sequence // tp.size
    own_weight = weight[tp.rank * rows : (tp.rank + 1) * rows].clone().requires_grad_()
    own_hidden = hidden[tp.rank * part : (tp.rank + 1) * part] if case.sequence_parallel else hidden
    own_hidden = own_hidden.clone().requires_grad_()
    own_bias = bias_of(case)[tp.rank * rows : (tp.rank + 1) * rows].clone().requires_grad_() if case.biased else None
    seed = torch.tensor(SEED_GRADIENT, dtype=torch.float64) if seeded else None
    buffer = main_gradient(own_weight, torch.nan, False) if seeded else None
    with patch.object(loss, "CHUNK_BYTES", case.chunk_bytes or loss.CHUNK_BYTES):
        given = own_hidden.clone()
        total = linear_cross_entropy(
            given,
            own_weight,
            labels,
            mask,
            vocab_size=case.vocab,
            logits=loss.Logits(own_bias, case.softcap, seed, overwrite=seeded),
            tp=tp,
            sequence_parallel=case.sequence_parallel,
            label_smoothing=case.smoothing,
            z_loss=case.z_loss,
        )
    if seeded:
        # The weight's gradient is there already, but in fp16, where the loss scale is in the seed.
        assert buffer is not None and buffer.isfinite().all() == (case.dtype != torch.float16)
        total.backward(torch.tensor(SEED_GRADIENT, dtype=total.dtype))
        assert own_weight.grad is None
        own_weight.grad = buffer.to(case.dtype)
        if not case.sequence_parallel and case.dtype != torch.float16 and tp.size == 1:
            assert own_hidden.grad is not None and given.equal(own_hidden.grad)
    else:
        (total * SEED_GRADIENT).backward()
    assert own_hidden.grad is not None and own_weight.grad is not None
    return total.detach(), own_hidden.grad, own_weight.grad, None if own_bias is None else own_bias.grad


def check(case: Case, tp: Axis, tolerance: float, seeded: bool = False) -> None:
    total, grad_hidden, grad_weight, grad_bias = computed(case, tp, seeded)
    want_total, want_hidden, want_weight, want_bias = expected(case)
    rows, part = case.padded // tp.size, case.sequence // tp.size
    if case.sequence_parallel:
        want_hidden = want_hidden[tp.rank * part : (tp.rank + 1) * part]
    want_weight = want_weight[tp.rank * rows : (tp.rank + 1) * rows]
    assert total.dtype == torch.promote_types(case.dtype, torch.float32), case
    assert abs(total.item() - want_total.item()) <= tolerance * max(1.0, want_total.item()), case
    pairs = [("hidden", grad_hidden, want_hidden), ("weight", grad_weight, want_weight)]
    assert (grad_bias is None) == (want_bias is None) == (not case.biased)
    if grad_bias is not None and want_bias is not None:
        pairs.append(("bias", grad_bias, want_bias[tp.rank * rows : (tp.rank + 1) * rows]))
    for name, got, want in pairs:
        assert got.dtype == case.dtype and got.shape == want.shape
        largest = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        assert (got.double() - want).abs().max().item() <= tolerance * largest, f"{name} of {case}"
    padding = max(0, case.vocab - tp.rank * rows)
    assert not grad_weight[padding:].any(), f"padding rows have a gradient in {case}"


CASES = [
    Case(
        vocab,
        72,
        smoothing=smoothing,
        z_loss=z_loss,
        masked=masked,
        chunk_bytes=chunk_bytes,
        scale=scale,
        biased=z_loss > 0,
    )
    for (vocab, smoothing, z_loss), (masked, chunk_bytes, scale) in zip(
        # Of 72 rows on 3 ranks, a vocabulary of 20 leaves one rank a part and one nothing at all.
        product((72, 50, 20), (0.0, 0.2), (0.0, 0.01)),
        [(0.3, None, 1.0), (0.0, 16 * 24 * 8, 1.0), (1.0, None, 1.0), (0.5, 1, 40.0)] * 3,
    )
]
# Tokens at, one below and one above the end of a chunk of 16.
CASES += [Case(sequence=s, batch=1, chunk_bytes=1, smoothing=0.1, z_loss=0.1, masked=0.2) for s in (15, 16, 17, 32, 33)]
# A rank's real rows decide how much memory its logits need; they must not decide where tokens are cut.
CASES += [Case(vocab=50, sequence=36, chunk_bytes=24 * 8 * size) for size in (17, 24, 36)]
CASES += [
    Case(softcap=cap, smoothing=0.1, z_loss=0.1, biased=True, chunk_bytes=size) for cap, size in ((3.0, 1), (0.5, None))
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("seeded", [False, True])
def test_one_process(case: Case, seeded: bool) -> None:
    check(case, Axis("tp"), 1e-12, seeded)


def test_what_is_written_beforehand_adds_up() -> None:
    """Of several micro-batches, and of a tied embedding's rows."""
    case = Case(chunk_bytes=1)
    (hidden, weight, labels, mask), (_, _, want, _) = data(case), expected(case)
    buffer = main_gradient(weight.requires_grad_(), 2.0, True)
    seed = torch.tensor(SEED_GRADIENT, dtype=torch.float64)
    for micro_batch in (1, 2):
        total = linear_cross_entropy(
            hidden, weight, labels, mask, vocab_size=case.vocab, logits=loss.Logits(seed=seed), tp=Axis("tp")
        )
        total.backward(seed)
        assert (buffer - 2.0 - micro_batch * want).abs().max() < 1e-12
    assert weight.main_grad.writes == 2  # type: ignore[attr-defined]


# GPT-2, Llama 1.3B, Llama 8B over tp=1 and tp=8, Gemma with its soft cap; tokens and those of a chunk.
CHUNKS = [
    (50304, 768, loss.Logits(), 2, 5, 256),
    (50304, 768, loss.Logits(), 2, 32768, 5632),
    (50304, 768, loss.Logits(overwrite=True), 2, 32768, 5632),
    (50304, 768, loss.Logits(overwrite=True, freed=2 * 32768 * 3072), 2, 32768, 8192),  # of the last MLP
    (50304, 768, loss.Logits(), 0, 32768, 2560),  # the table is frozen: chunks cost nothing
    (32000, 2048, loss.Logits(), 2, 8191, 8192),
    (32000, 2048, loss.Logits(), 2, 8193, 4352),
    (32000, 2048, loss.Logits(), 2, 16383, 8192),
    (32000, 2048, loss.Logits(), 2, 32768, 8192),
    (32000, 2048, loss.Logits(), 1, 32768, 8192),
    (128256, 4096, loss.Logits(), 2, 16384, 8192),
    (16032, 4096, loss.Logits(), 2, 40000, 8192),
    (256000, 2304, loss.Logits(softcap=30.0), 2, 8192, 4096),
    (256000, 64, loss.Logits(), 1, 8192, 512),
]


@pytest.mark.parametrize(("rows", "width", "given", "spared", "tokens", "want"), CHUNKS)
def test_chunks_on_a_gpu(rows: int, width: int, given: loss.Logits, spared: int, tokens: int, want: int) -> None:
    """As large as pays, equal, and no larger than what a gradient of the table beside small ones would take."""
    rules = loss._Rules(loss.LossTerms(0.0, 0.0, rows), Axis("tp"), rows, True, given)
    x = torch.empty(tokens, width, dtype=torch.bfloat16, device="meta")
    with registry.meta_as("cuda"):
        chunk = rules.chunk(x, torch.float32, spared)
    assert chunk == want and chunk % 256 == 0 and chunk <= 8192
    assert chunk - tokens / -(-tokens // chunk) < 256
    logits = 2 * chunk * rows * (1 if given.softcap is None else 2)
    assert logits <= (256 << 20) + spared * 4 * rows * width + given.overwrite * x.nbytes + given.freed


def check_unfused(tp: Axis) -> int:
    """The loss of whole logits, and their gradient, which is written over them."""
    done = 0
    for smoothing, z_loss, vocab in product((0.0, 0.2), (0.0, 0.01), (72, 50, 20)):
        case = Case(vocab, smoothing=smoothing, z_loss=z_loss)
        hidden, weight, labels, mask = data(case)
        whole = (hidden @ weight.T).requires_grad_()
        used = whole[..., :vocab][mask]
        want = F.cross_entropy(used, labels[mask], reduction="sum", label_smoothing=smoothing)
        want = want + z_loss * used.logsumexp(-1).square().sum()
        (want * SEED_GRADIENT).backward()
        assert whole.grad is not None
        columns = slice(tp.rank * 72 // tp.size, (tp.rank + 1) * 72 // tp.size)
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 2e-2)):
            own = whole.detach()[..., columns].to(dtype, copy=True).contiguous()
            leaf = own.requires_grad_()
            # A module's logits are no leaf: a leaf that requires gradients may not be overwritten.
            total = cross_entropy(
                leaf.view_as(leaf), labels, vocab_size=vocab, tp=tp, label_smoothing=smoothing, z_loss=z_loss
            )
            (total * SEED_GRADIENT).backward()
            assert leaf.grad is not None and abs(total.item() / want.item() - 1) <= tolerance
            error = (leaf.grad.double() - whole.grad[..., columns]).abs().max().item()
            assert error <= tolerance and not leaf.grad[~mask].any(), f"{error} of {case}"
            assert torch.allclose(own.detach() * SEED_GRADIENT, leaf.grad, rtol=tolerance), "not in place"
        done += 1
    return done


def test_logits_that_are_there_already() -> None:
    assert check_unfused(Axis("tp")) == 12


def test_which_label_does_not_count_may_be_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([3, 5, 0, 5, 8, 2])
    want = F.cross_entropy(logits, labels, ignore_index=5, reduction="sum")
    (gradient,) = torch.autograd.grad(want, logits)
    own = logits.detach().clone().requires_grad_()
    found = cross_entropy(own * 1.0, labels, vocab_size=9, tp=Axis("tp"), ignore_index=5)
    found.backward()
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(own.grad, gradient)


def check_all(tp_size: int) -> int:
    mesh = Mesh.create(MeshShape(tp=tp_size), device_of_rank(dist.get_rank(), tp_size))
    done = 0
    assert check_unfused(mesh.tp) == 12
    for case in CASES:
        check(case, mesh.tp, 1e-12)
        done += 1
        if case.sequence % tp_size == 0:
            check(Case(**{**vars(case), "sequence_parallel": True}), mesh.tp, 1e-12, seeded=True)
            done += 1
    return done


@pytest.mark.parametrize("tp_size", [2, 3])
def test_vocabulary_split_over_ranks(tp_size: int) -> None:
    assert (
        run_ranks(check_all, tp_size, tp_size) == [sum(2 - (case.sequence % tp_size > 0) for case in CASES)] * tp_size
    )


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
def test_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    for smoothing, z_loss, chunk_bytes in ((0.0, 0.0, None), (0.1, 0.01, 1)):
        case = Case(smoothing=smoothing, z_loss=z_loss, chunk_bytes=chunk_bytes, dtype=dtype, biased=z_loss > 0)
        check(case, Axis("tp"), tolerance)
        check(case, Axis("tp"), tolerance, seeded=True)


def test_many_chunks_do_not_lose_weight_gradient_in_bf16() -> None:
    """The weight's gradient is a sum over all tokens, here 256 chunks that are equal but for rounding."""
    case = Case(sequence=4096, batch=1, chunk_bytes=1, dtype=torch.bfloat16, masked=0.0)
    _, _, want, _ = expected(case)
    for seeded in (False, True):
        _, _, grad, _ = computed(case, Axis("tp"), seeded)
        assert (grad.double() - want).norm() < 0.01 * want.norm()


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes of tensors made by ``run`` that were there at one time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()  # held until the profiler has ended: it knows no tensor freed later
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    del result
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_beside_the_gradients_there_is_one_chunk_of_logits(dtype: torch.dtype) -> None:
    """In half precision also its copy in fp32, from which the gradient is computed. Here 3 chunks of 4 MB."""
    vocab, width, tokens, chunk = 8192, 256, 384, 128
    hidden, weight = (torch.randn(*shape, dtype=dtype) for shape in ((tokens, 1, width), (vocab, width)))
    labels, mask = torch.randint(vocab, (tokens, 1)), torch.ones(tokens, 1, dtype=torch.bool)
    options: dict[str, Any] = {"vocab_size": vocab, "tp": Axis("tp")}
    logits = chunk * vocab * (4 if dtype == torch.float32 else 4 + dtype.itemsize)
    with patch.object(loss, "CHUNK_BYTES", chunk * vocab * 4):
        arguments = (hidden.requires_grad_(), weight.requires_grad_(), labels, mask)
        peak = peak_bytes(lambda: linear_cross_entropy(*arguments, **options))
        gradients = hidden.nbytes + weight.numel() * 4  # the weight's in fp32
        # A block of a product that is added after it was made, beside copies of its operands; in half precision,
        # rounded before.
        block = 4 * (onednn._BLOCK_COLUMNS * (width + chunk) + chunk * width) if onednn.BLAS_IS_SLOW else 0
        blocks = 2 << 20 if dtype == torch.bfloat16 else block
        assert gradients + logits <= peak < gradients + logits + (blocks if dtype == torch.float32 else 0) + 200_000
        # With a main gradient and a seed there is no other gradient of the weight.
        main_gradient(weight, 0.0, True)
        seeded = loss.Logits(seed=torch.tensor(0.5))
        peak = peak_bytes(lambda: linear_cross_entropy(*arguments, logits=seeded, **options))
        assert hidden.nbytes + logits <= peak < hidden.nbytes + logits + blocks + 200_000


def test_large_logits_stay_finite() -> None:
    check(Case(scale=1e4, smoothing=0.1), Axis("tp"), 1e-9)


def test_only_what_needs_a_gradient_gets_one() -> None:
    case = Case(smoothing=0.1, z_loss=0.01)
    want, want_hidden, want_weight, _ = expected(case)
    hidden, weight, labels, mask = data(case)
    arguments = {"vocab_size": case.vocab, "tp": Axis("tp"), "label_smoothing": 0.1, "z_loss": 0.01}
    for needs_hidden, needs_weight in ((True, False), (False, True)):
        h, w = hidden.clone().requires_grad_(needs_hidden), weight.clone().requires_grad_(needs_weight)
        (linear_cross_entropy(h, w, labels, mask, **arguments) * SEED_GRADIENT).backward()
        assert (h.grad is not None) == needs_hidden and (w.grad is not None) == needs_weight
        got, wanted = (h.grad, want_hidden) if needs_hidden else (w.grad, want_weight)
        assert got is not None and (got - wanted).abs().max() < 1e-12
    w = weight.clone().requires_grad_()
    with torch.no_grad(), patch.object(torch.Tensor, "addmm_", side_effect=AssertionError("gradient computed")):
        total = linear_cross_entropy(hidden, w, labels, mask, **arguments)
    assert not total.requires_grad and abs(total - want) < 1e-12 * want


@pytest.mark.parametrize("label", [-1, 50, 71, 10**9])
def test_a_label_that_is_no_token(label: int) -> None:
    """Also one of the table's padding. What does not count may be anything."""
    case = Case(vocab=50, masked=0.0)
    hidden, weight, labels, mask = data(case)
    labels[3, 1] = label
    options: dict[str, Any] = {"vocab_size": case.vocab, "tp": Axis("tp")}
    for run in (
        lambda mask: linear_cross_entropy(hidden, weight, labels, mask, **options),
        lambda mask: cross_entropy(hidden @ weight.T, labels, mask, **options),
    ):
        with pytest.raises(RuntimeError, match=r"a label that counts is outside of 0..49: set its loss_mask to False"):
            run(mask)
        without = mask.clone()
        without[3, 1] = False
        assert run(without).isfinite()


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_no_value_is_asked_for_on_the_way(implementation: str) -> None:
    """Of tensors without values: what would wait for the GPU would ask for one, and raise."""
    tp = Axis("tp", 1, 2, object(), (0, 1))  # type: ignore[arg-type]
    sent: list[tuple[int, ...]] = []

    def gathered(x: Tensor, axis: Axis) -> comm.Pending:
        sent.append(tuple(x.shape))
        return comm.Pending(torch.cat([x, x]))

    with (
        FakeTensorMode(),
        registry.use({"cross_entropy": implementation}),
        patch.object(comm, "gather_dim0", gathered),
        patch.object(comm, "scatter_sum_dim0", lambda x, axis: comm.Pending(x[: len(x) // 2])),
        patch.object(loss, "CHUNK_BYTES", 1 << 16),
    ):
        make = partial(torch.empty, dtype=torch.bfloat16, requires_grad=True)
        hidden, table, bias = make(20, 2, WIDTH), make(512, WIDTH), make(512)
        labels, mask = (torch.empty(40, 2, dtype=dtype) for dtype in (torch.int64, torch.bool))
        options: dict[str, Any] = {"vocab_size": 1000, "tp": tp, "label_smoothing": 0.1, "z_loss": 0.1}
        total = linear_cross_entropy(
            hidden, table, labels, mask, logits=loss.Logits(bias), sequence_parallel=True, **options
        )
        gradients = torch.autograd.grad(total, (hidden, table, bias))
        assert [g.shape for g in gradients] == [x.shape for x in (hidden, table, bias)]
        with pytest.raises(DataDependentOutputException):
            total.item()
    # The hidden states, then one packed message a chunk of 32 tokens.
    assert sent == [(20, 2, WIDTH), (4, 32), (4, 32), (4, 16)]
