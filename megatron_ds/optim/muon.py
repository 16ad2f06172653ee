"""Muon: the momentum of each weight matrix, made orthogonal, is its update; AdamW updates everything else.

Keller Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the scale of Liu et al. 2025 (arXiv 2502.16982,
section 2.2), under which an update is as large as AdamW's and both take the same learning rate.

A matrix is what a linear layer multiplies by: of a fused weight queries, keys and values are one each, and gate and up
projection; or, with ``muon_heads``, each head of a query, key or value. Which rows those are follows from the global
shape (:class:`~megatron_ds.shard.Matrices`), and the iteration sees whole matrices: ZeRO puts each on one rank, and
what tensor parallelism cuts is gathered. A mesh that puts whole matrices on other ranks (heads, experts) cuts none. So
an update is the same on every mesh.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ds import comm
from megatron_ds.config import OptimizerConfig
from megatron_ds.errors import ConfigError
from megatron_ds.mesh import Axis
from megatron_ds.optim.rule import Late, OptimizerSegment, RuleGroup, Update, UpdateRule
from megatron_ds.shard import Matrices, ShardSpec

MOMENTUM = "momentum_buffer"
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic of Jordan et al. 2024: singular values between 1e-3 and 1 end near 1, within about 0.3, in 5 steps."""
EPS = 1e-7
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def orthogonalize(matrix: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Matrices with all singular values near 1, by Newton-Schulz iterations: ``[(l,) m, n]``, of ``dtype``."""
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    add = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def size_factor(rows: int, columns: int, adjust: str) -> float:
    """What the learning rate is multiplied by for a matrix of that size.

    ``match_rms_adamw``: the update's root mean square becomes 0.2, about that of AdamW's. ``original``: Jordan's.
    """
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


class MuonRule:
    """Muon for the weights of linear layers, another rule for the rest.

    Args:
        specs: of the parameters of this rank.
        tp: the axis over which weights are cut.
        others: updates what is no matrix.

    Raises:
        ConfigError: no parameter is a weight of a linear layer, or a matrix is cut over another axis than ``tp``.
    """

    def __init__(self, config: OptimizerConfig, specs: Sequence[ShardSpec], tp: Axis, others: UpdateRule):
        self.config, self.tp = config, tp
        self.specs: Mapping[str, ShardSpec] = {spec.name: spec for spec in specs if spec.matrices is not None}
        self._others = others
        if specs and not self.specs:
            raise ConfigError(
                f"optimizer.name='muon' finds no matrix among {len(specs)} parameters ({specs[0].name} is the first): "
                "none is the weight of a linear layer; use optimizer.name='adamw'"
            )
        for spec in self.specs.values():
            for cut in spec.placements:
                if cut.count > 1 and cut.axis != tp.name and cut.dim >= self.matrices_of(spec).leading:
                    raise ConfigError(
                        f"optimizer.name='muon' takes whole matrices, and {spec.name} is cut over mesh.{cut.axis}, "
                        "over which Muon does not gather; use optimizer.name='adamw'"
                    )

    def matrices_of(self, spec: ShardSpec) -> Matrices:
        assert spec.matrices is not None
        return spec.matrices.by_head() if self.config.muon_heads else spec.matrices

    def group_of(self, name: str) -> RuleGroup:
        if name in self.specs:
            return RuleGroup(number=1, kinds=(MOMENTUM,), whole=True, gathers=True)
        return self._others.group_of(name)

    def begin_step(self) -> None:
        self._others.begin_step()

    def over(self, segments: Sequence[OptimizerSegment]) -> Update:
        return MuonUpdate(self, segments) if segments[0].name in self.specs else self._others.over(segments)


class MuonUpdate:
    """Muon over ``segments``, each this rank's part of one weight. The ranks of tp have the same ones."""

    def __init__(self, rule: MuonRule, segments: Sequence[OptimizerSegment]):
        self._rule = rule
        self.frozen: frozenset[str] = frozenset()
        self.bind(segments)

    def bind(self, segments: Sequence[OptimizerSegment]) -> None:
        self._segments = segments

    def set_count(self, updates: int) -> None:
        """Nothing depends on the number of updates."""

    def late(self, updates: int) -> Late:
        return {}

    def load_late(self, late: Late) -> None:
        """No parameter has numbers of its own."""

    @torch.no_grad()
    def step(self, lr: float, scale: float | Tensor = 1.0) -> None:
        trained = [segment for segment in self._segments if segment.name not in self.frozen]
        # Known to the device alone. Where it is true, every step below adds zero or multiplies by one.
        skipped = scale.isnan() if isinstance(scale, Tensor) else None
        directions = [self._direction(segment, scale, skipped) for segment in trained]
        for segment, update in zip(trained, self._orthogonal(trained, directions)):
            if segment.weight_decay:
                segment.master.mul_(_unless(skipped, 1.0 - lr * self._rule.config.weight_decay, 1.0, segment.master))
            segment.master.add_(update if skipped is None else update.masked_fill(skipped, 0.0), alpha=-lr)

    def _direction(self, segment: OptimizerSegment, scale: float | Tensor, skipped: Tensor | None) -> Tensor:
        """The momentum, Nesterov's if asked for. Clipping, which is in ``scale``, comes before it."""
        beta, momentum = self._rule.config.muon_momentum, segment.state[MOMENTUM]
        gradient = segment.gradient.mul_(scale)
        if skipped is not None:
            gradient.masked_fill_(skipped, 0.0)
        momentum.lerp_(gradient, _unless(skipped, 1.0 - beta, 0.0, momentum))
        return gradient.lerp(momentum, beta) if self._rule.config.muon_nesterov else momentum

    def _orthogonal(self, segments: Sequence[OptimizerSegment], directions: Sequence[Tensor]) -> Iterator[Tensor]:
        """The update of each segment. What tp cuts is computed whole, in turn by one of its ranks each."""
        tp = self._rule.tp
        specs = [self._rule.specs[segment.name] for segment in segments]
        for number, (spec, direction) in enumerate(zip(specs, directions)):
            leading = self._rule.matrices_of(spec).leading
            cut = next((p for p in spec.placements if p.count > 1 and p.dim >= leading), None)
            if cut is None:
                yield self._of_matrices(spec, direction)
                continue
            rows_first = direction.movedim(cut.dim, 0)
            whole = comm.gather_dim0(rows_first, tp).wait()
            if number % tp.size == tp.rank:
                whole = self._of_matrices(spec, whole.movedim(0, cut.dim)).movedim(cut.dim, 0).contiguous()
            else:
                whole.zero_()
            # A sum with zeros: every rank gets its part of what one has computed.
            yield comm.scatter_sum_dim0(whole, tp).wait().movedim(0, cut.dim)

    def _of_matrices(self, spec: ShardSpec, whole: Tensor) -> Tensor:
        """Each matrix of a whole weight made orthogonal and scaled; of the weight's shape and dtype."""
        config, matrices = self._rule.config, self._rule.matrices_of(spec)
        found = []
        for part in matrices.split(whole):
            matrix = part.reshape(part.shape[: matrices.leading].numel(), -1, part.shape[-1])
            matrix = matrix if matrices.leading else matrix[0]
            rows, columns = matrix.shape[-2:]
            update = orthogonalize(matrix, config.muon_steps, DTYPES[config.muon_dtype]).to(whole.dtype)
            found.append((update * size_factor(rows, columns, config.muon_adjust)).view(part.shape))
        return torch.cat(found, dim=matrices.dim) if len(found) > 1 else found[0]


def _unless(skipped: Tensor | None, value: float, instead: float, like: Tensor) -> Any:
    """A number, or a 0-d tensor where the device knows which of the two."""
    return value if skipped is None else like.new_full((), value).masked_fill_(skipped, instead)
