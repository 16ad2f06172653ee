"""One step of the model on a rank: tokens in, the logits of the wanted rows out."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.inference.batching import Plan
from megatron_ds.inference.compiled_stage import CompiledDecoding, CompiledStage
from megatron_ds.inference.decode_graphs import Capture, DecodeGraphs, GraphSizes
from megatron_ds.inference.paged_cache import ROUNDED, PagedBatch, PagedCache, PagedStep, StepPlaces
from megatron_ds.inference.pages import Pages
from megatron_ds.layers.recipe import OwnPrecision, Recipe
from megatron_ds.mesh import Mesh
from megatron_ds.models.block import SITES_A_BLOCK
from megatron_ds.models.transformer import Transformer

_SMALL = 1 << 25
"""Of models with fewer weights, rows of prompts are padded to multiples of ``ROUNDED`` on a CPU, as queries are in
attention. For larger ones, computing more rows takes longer than compiling a kernel for their number."""


@dataclass(frozen=True)
class CacheSize:
    """``blocks`` of ``size`` tokens each, kept in ``dtype``."""

    blocks: int
    size: int
    dtype: torch.dtype


def local_kv_heads(model: Transformer) -> int:
    """Key/value heads on this rank; where there are fewer than ranks, each computes one of them, as others do."""
    return max(1, model.config.num_kv_heads // model.tp.size)


def bytes_of_token(model: Transformer, dtype: torch.dtype) -> int:
    """Of the key/value cache of this stage."""
    return 2 * len(model.layers) * Pages.bytes_of_token(local_kv_heads(model), model.config.head_size, dtype)


class ModelRunner:
    """A stage of the model with its part of the key/value cache.

    Args:
        model: in evaluation mode, without sequence parallelism. size: of the cache.
        head_recipe: of the product with the vocabulary.
        apart: attend to texts one by one, so that no bit depends on what else is computed.
        compiled: compile the model where steps gain by it: in half precision (with wider numbers the products take
            nearly all the time) on one rank of a CPU.
    """

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        size: CacheSize,
        head_recipe: Recipe | None = None,
        apart: bool = False,
        compiled: bool = False,
    ):
        self.model, self.mesh, self.apart = model, mesh, apart
        self.device, self.head_recipe = mesh.device, head_recipe or OwnPrecision()
        layers = [int(name) for name in model.layers]
        heads, head_dim = local_kv_heads(model), model.config.head_size
        # One more than the pool has: no text holds it.
        self._scratch = size.blocks
        self.graphs: DecodeGraphs | None = None
        self.cache = PagedCache(layers, size.blocks + 1, size.size, heads, head_dim, size.dtype, self.device)
        self.dtype = next(model.parameters()).dtype
        self._compiled: CompiledStage | None = None
        self.decoding: CompiledDecoding | None = None
        small = 12 * model.config.num_layers * model.config.hidden_size**2 < _SMALL  # on all stages alike
        self._rounded = ROUNDED if mesh.device.type == "cpu" and small and not apart else 1
        alone = mesh.world.size == 1 and mesh.device.type == "cpu"
        if compiled and alone and not apart and self.dtype in (torch.bfloat16, torch.float16):
            self.compile()

    def compile(self, compiled: bool = True) -> None:
        """From now on run graphs of the model, as :class:`CompiledStage` and :class:`CompiledDecoding` have them."""
        self._compiled = CompiledStage(self.model, compiled)
        if CompiledDecoding.can(self.model, self.cache):
            self.decoding = CompiledDecoding(self.model, self.head_recipe, self.cache, compiled)

    def capture(self, capture: Capture | None, sizes: GraphSizes) -> None:
        """From now on replay decode steps as graphs, where there is a way to capture them."""
        if capture is not None:
            self.graphs = DecodeGraphs(self._decoded, capture, sizes, self._scratch, self.device)

    @torch.inference_mode()
    def run(self, plan: Plan, rows: Many[int]) -> Tensor | None:
        """Logits ``[len(rows), v / tp]`` of these rows of the step, in the model's dtype, on the last stage."""
        self.cache.copy(plan.copies)  # first: a block that was copied may have been given back and taken anew since
        self.cache.clear(plan.fresh)
        spans = plan.spans
        if self.decoding is not None and self.decoding.takes(spans):
            return _of_rows(self.decoding.run(spans, bool(plan.copies)), rows)
        places = StepPlaces.of(
            [s.sequence.blocks for s in spans], [s.count for s in spans], [s.start for s in spans], self.cache.size
        )
        tokens = [token for span in spans for token in span.tokens]
        if self.graphs is not None and self.graphs.takes(places):
            return _of_rows(self.graphs.run(tokens, places), rows)
        padding = 0 if places.decodes else -len(tokens) % self._rounded
        if padding:  # their results are dropped
            tokens += [0] * padding
            places = places.padded(padding, self._scratch)
        pp = self.mesh.pp
        hidden = None
        if not pp.is_first:
            hidden = torch.empty(len(tokens), 1, self.model.config.hidden_size, dtype=self.dtype, device=self.device)
            dist.recv(hidden, group=pp.group, group_src=pp.rank - 1)
        hidden = self._hidden(
            torch.tensor([tokens], device=self.device),
            torch.from_numpy(places.positions).unsqueeze(0).to(self.device),
            places.step(self.device),
            hidden,
        )
        if not pp.is_last:
            dist.send(hidden.contiguous(), group=pp.group, group_dst=pp.rank + 1)
            return None
        return self._logits(_of_rows(hidden, rows))

    def _hidden(self, tokens: Tensor, positions: Tensor, step: PagedStep, hidden: Tensor | None = None) -> Tensor:
        batch = PagedBatch(self.cache, step, lambda site: (site - 1) // SITES_A_BLOCK, self.apart)
        forward = self.model.hidden_states if self._compiled is None else self._compiled.head_input
        return forward({"tokens": tokens, "position_ids": positions}, hidden, batch.make_core)

    def _logits(self, hidden: Tensor) -> Tensor:
        if self._compiled is None:
            hidden = self.model.head_input(hidden)
        if not len(hidden):  # of chunks of prompts nothing follows, and not all recipes multiply no rows
            return hidden.new_empty(0, self.model.output_weight.shape[0])
        return self.model.local_logits(hidden, self.head_recipe.product)[:, 0]

    def _decoded(self, tokens: Tensor, positions: Tensor, step: PagedStep) -> Tensor:
        return self._logits(self._hidden(tokens, positions, step))


def _of_rows(x: Tensor, rows: Many[int]) -> Tensor:
    """Different ``rows`` of ``x``, in their order."""
    return x if len(rows) == len(x) else x[torch.tensor(rows, dtype=torch.int64, device=x.device)]
