"""Which blocks of the score matrix a head computes: the layouts of block-sparse attention.

The score matrix of a head, ``[s, s]`` with queries as rows, is cut into square blocks. A :class:`BlockLayout` lists the
*live* ones; the others are neither computed nor stored. A live block is *full*, or *partial*: then a mask says which of
its tokens are allowed. A causal layout's diagonal blocks are partial, so that no token sees a later one; so are the
blocks of any :func:`from_mask` or :func:`from_block_mask` that are neither empty nor full.

Layouts by name are in :mod:`megatron_ds.kernels.block_patterns`.

Shapes: ``s`` tokens, ``t`` blocks a side, ``n`` heads, ``p`` patterns (heads with the same blocks share one),
``live`` blocks over all patterns, ``m`` masks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from megatron_ds.errors import ConfigError

BLOCK_SIZES = (16, 32, 64, 128)
FULL = -1
# A column of blocks is long, so that several programs share it, if it holds at least so many blocks and so many times
# those of an average one: a global column, but not the first ones of a dense causal layout.
_LONG, _LONGER = 16, 4
# A window's rows hold at most so many blocks. In longer ones it pays to take those that need no mask by themselves.
_WINDOW = 8


@dataclass(frozen=True, eq=False)
class BlockLists:
    """For every line of blocks (a row, or in the transpose a column) the live blocks on it, full ones first.

    Attributes:
        start: ``[p * t + 1]`` int32: line ``i`` of pattern ``j`` has the entries ``start[j * t + i]`` up to the next.
        partial: ``[p * t]`` int32: where its partial blocks begin.
        index: ``[live]`` int32: the block's place on the line.
        mask: ``[live]`` int32: which mask it has; FULL for none.
    """

    start: Tensor
    partial: Tensor
    index: Tensor
    mask: Tensor

    @staticmethod
    def of(line: Tensor, index: Tensor, mask: Tensor, lines: int, side: int) -> BlockLists:
        """Sort entries given in any order; ``line`` in ``[0, lines)``, ``index`` in ``[0, side)``."""
        order = ((line * 2 + (mask != FULL)) * side + index).argsort()
        start = torch.zeros(lines + 1, dtype=torch.int64, device=line.device)
        start[1:] = line.bincount(minlength=lines).cumsum(0)
        partial = start[:-1] + line[mask == FULL].bincount(minlength=lines)
        return BlockLists(*(x.to(torch.int32) for x in (start, partial, index[order], mask[order])))

    def lines(self) -> Tensor:
        """``[live]`` int64: the line of every entry."""
        numbers = torch.arange(len(self.partial), device=self.start.device)
        return numbers.repeat_interleave((self.start[1:] - self.start[:-1]).to(torch.int64))

    def to(self, device: torch.device | str) -> BlockLists:
        return BlockLists(*(x.to(device) for x in (self.start, self.partial, self.index, self.mask)))


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The live blocks of every head, by row and by column.

    Attributes:
        length: tokens ``s``; the last block of a row may be cut short by it.
        block: tokens along a block's side: 16, 32, 64 or 128.
        pattern: ``[n]`` int32: the pattern of each head.
        rows: the blocks of each row of blocks; ``rows.index`` are columns.
        columns: the same blocks by column: ``columns.index`` are rows.
        masks: ``[m, block, block]`` bool, query by key; True where a token is allowed.
        short_columns, long_columns: int32, together all columns of blocks; the long ones hold many times the average.
        is_window: whether every row is one short run of blocks up to the diagonal's, no row's begins before that of the
            row above, and a query sees all keys of the run that are not after it: so places alone say what is allowed.
    """

    length: int
    block: int
    pattern: Tensor
    rows: BlockLists
    columns: BlockLists
    masks: Tensor
    short_columns: Tensor
    long_columns: Tensor
    is_window: bool

    @property
    def side(self) -> int:
        """Blocks along a side."""
        return -(-self.length // self.block)

    @property
    def heads(self) -> int:
        return len(self.pattern)

    def live_blocks(self) -> Tensor:
        """``[n]`` int64: live blocks of each head."""
        ends = self.rows.start[:: self.side].to(torch.int64)
        return (ends[1:] - ends[:-1])[self.pattern.to(torch.int64)]

    def density(self) -> float:
        """Live blocks over all blocks of all heads, counting both triangles."""
        return float(self.live_blocks().sum()) / (self.heads * self.side**2)

    def to(self, device: torch.device | str) -> BlockLayout:
        return replace(
            self,
            pattern=self.pattern.to(device),
            rows=self.rows.to(device),
            columns=self.columns.to(device),
            masks=self.masks.to(device),
            short_columns=self.short_columns.to(device),
            long_columns=self.long_columns.to(device),
        )

    def of_heads(self, first: int, count: int) -> BlockLayout:
        """The layout of ``count`` heads from ``first`` on: what a tensor-parallel rank holds of the whole model's."""
        pattern = self.pattern[first : first + count].to(torch.int64)
        used, local = pattern.unique(return_inverse=True)
        line = self.rows.lines()
        new = torch.full((int(self.pattern.max()) + 1,), -1, device=pattern.device)
        new[used] = torch.arange(len(used), device=pattern.device)
        owner = new[line // self.side]
        kept = owner >= 0
        return build(
            self.length,
            self.block,
            local,
            (owner * self.side + line % self.side)[kept],
            self.rows.index[kept].to(torch.int64),
            self.rows.mask[kept].to(torch.int64),
            self.masks,
        )

    def to_mask(self) -> Tensor:
        """``[n, s, s]`` bool, True where attention is allowed: for small sequences only."""
        table = self._table()[self.pattern.to(torch.int64)]
        tiles = self._tiles()
        whole = tiles[table].permute(0, 1, 3, 2, 4).reshape(self.heads, self.side * self.block, -1)
        return whole[:, : self.length, : self.length]

    def to_block_mask(self) -> BlockMask:
        """FlexAttention's form of this layout, for any batch size: ``BlockMask`` of shape ``[1, n, s, s]``."""
        table = self._table()[self.pattern.to(torch.int64)]
        tiles, block, full = self._tiles(), self.block, len(self.masks)

        def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return tiles[table[h, query // block, key // block], query % block, key % block]

        partial, whole = (_padded(kind) for kind in (table < full, table == full))
        return BlockMask.from_kv_blocks(
            *partial, *whole, BLOCK_SIZE=block, mask_mod=allowed, seq_lengths=(self.length, self.length)
        )

    def _tiles(self) -> Tensor:
        """``[m + 2, block, block]``: the masks, then a full block and an empty one, as :meth:`_table` numbers them."""
        full = self.masks.new_ones(1, self.block, self.block)
        return torch.cat([self.masks, full, ~full])

    def _table(self) -> Tensor:
        """``[p, t, t]`` int64: each block's mask; ``m`` for a full block, ``m + 1`` for one that is not live."""
        patterns = len(self.rows.partial) // self.side
        table = torch.full((patterns * self.side, self.side), len(self.masks) + 1, device=self.masks.device)
        mask = self.rows.mask.to(torch.int64)
        table[self.rows.lines(), self.rows.index.to(torch.int64)] = torch.where(mask == FULL, len(self.masks), mask)
        return table.view(patterns, self.side, self.side)


def _padded(live: Tensor) -> tuple[Tensor, Tensor]:
    """FlexAttention's (number of blocks ``[1, n, t]``, their indices ``[1, n, t, t]``) of ``live [n, t, t]``."""
    order = live.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return live.sum(-1, dtype=torch.int32).unsqueeze(0), order.to(torch.int32).unsqueeze(0)


def build(
    length: int, block: int, pattern: Tensor, line: Tensor, column: Tensor, mask: Tensor, masks: Tensor
) -> BlockLayout:
    """From the live blocks in any order, each once.

    Args:
        pattern: ``[n]`` int64.
        line: ``[live]`` int64: pattern * t + row.
        column, mask: ``[live]`` int64.
        masks: ``[m, block, block]`` bool.
    """
    side = -(-length // block)
    lines = (int(pattern.max()) + 1) * side
    transposed = line // side * side + column
    columns = BlockLists.of(transposed, line % side, mask, lines, side)
    counts = columns.start.diff().view(-1, side).amax(0)
    rows = BlockLists.of(line, column, mask, lines, side)
    is_long = (counts >= _LONG) & (counts > _LONGER * counts.to(torch.float32).mean())
    short, long = (chosen.nonzero().flatten().to(torch.int32) for chosen in (~is_long, is_long))
    return BlockLayout(
        length, block, pattern.to(torch.int32), rows, columns, masks, short, long, _is_window(rows, masks, side)
    )


def _is_window(rows: BlockLists, masks: Tensor, side: int) -> bool:
    counts, row = rows.start.diff(), torch.arange(len(rows.partial), device=rows.start.device) % side
    if int(counts.min()) < 1 or int(counts.max()) > _WINDOW:
        return False
    first = rows.index[rows.start[:-1].to(torch.int64)]  # full blocks come first, and so does the lowest of them
    own = row[rows.lines()]
    partial = rows.mask != FULL
    triangles = masks[rows.mask[partial].to(torch.int64)]
    return bool(
        (rows.index <= own).all()
        and (first + counts == row + 1).all()
        and (first.view(-1, side).diff() >= 0).all()
        and (partial == (rows.index == own)).all()
        and (triangles == torch.ones_like(triangles).tril()).all()
    )


def from_mask(allowed: Tensor, block: int) -> BlockLayout:
    """The layout of any mask ``[n, s, s]`` bool: blocks without an allowed token are not live."""
    length = allowed.shape[-1]
    check_size(length, block)
    side = -(-length // block)
    patterns, pattern = allowed.unique(dim=0, return_inverse=True)
    whole = torch.zeros(len(patterns), side * block, side * block, dtype=torch.bool, device=allowed.device)
    whole[:, :length, :length] = patterns
    tiles = whole.view(-1, side, block, side, block).transpose(2, 3)
    live = tiles.flatten(3).any(-1)
    owner, row, column = live.nonzero(as_tuple=True)
    tiles = tiles[owner, row, column]
    partial = ~tiles.flatten(1).all(-1)
    mask = torch.full_like(owner, FULL)
    masks = tiles[:0]
    if partial.any():
        masks, mask[partial] = tiles[partial].unique(dim=0, return_inverse=True)
    return build(length, block, pattern, owner * side + row, column, mask, masks)


def from_block_mask(mask: BlockMask) -> BlockLayout:
    """A layout from FlexAttention's form; its ``mask_mod`` is evaluated on the partial blocks.

    Raises ConfigError for a mask that differs between samples, is not square, or has blocks that are not square.
    """
    batch, heads, queries, keys = mask.shape
    tall, wide = mask.BLOCK_SIZE
    if batch != 1 or queries != keys or tall != wide:
        raise ConfigError(
            f"a BlockMask of shape {list(mask.shape)} with blocks {tall} x {wide} has no BlockLayout: it must be "
            "[1, heads, s, s] with square blocks"
        )
    check_size(queries, tall)
    side = -(-queries // tall)
    full = _entries(mask.full_kv_num_blocks, mask.full_kv_indices)
    partial = _entries(mask.kv_num_blocks, mask.kv_indices)
    device = mask.kv_indices.device
    inside = torch.arange(tall, device=device)
    head, row, column = partial
    query = (row * tall).view(-1, 1, 1) + inside.view(1, -1, 1)
    key = (column * tall).view(-1, 1, 1) + inside
    # Beyond the sequence nothing is allowed; mask_mod is not asked there, it may not know such positions.
    valid = (query < queries) & (key < queries)
    asked = mask.mask_mod(
        head.new_zeros(()), head.view(-1, 1, 1), query.clamp(max=queries - 1), key.clamp(max=keys - 1)
    )
    masks, number = (asked & valid).unique(dim=0, return_inverse=True) if len(head) else (valid, head)
    if queries % tall and len(full[0]):  # a full block at the edge holds keys beyond the sequence
        edge = full[2] == side - 1
        masks = torch.cat([masks, (inside < queries % tall).expand(1, tall, tall)])
        kind = torch.where(edge, len(masks) - 1, FULL)
    else:
        kind = torch.full_like(full[0], FULL)
    heads_, rows_, columns_ = (torch.cat(pair) for pair in zip(full, partial))
    pattern = torch.arange(heads, device=device)
    return build(queries, tall, pattern, heads_ * side + rows_, columns_, torch.cat([kind, number]), masks)


def _entries(count: Tensor | None, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(head, row, column) of the blocks that FlexAttention's padded lists hold."""
    if count is None or index is None:
        nothing = torch.zeros(0, dtype=torch.int64)
        return nothing, nothing, nothing
    used = torch.arange(index.shape[-1], device=index.device) < count[0].unsqueeze(-1)
    head, row, place = used.nonzero(as_tuple=True)
    return head, row, index[0, head, row, place].to(torch.int64)


def check_size(length: int, block: int) -> None:
    if block not in BLOCK_SIZES:
        raise ConfigError(f"block={block} is not one of {', '.join(map(str, BLOCK_SIZES))}")
    if length < 1:
        raise ConfigError(f"a layout of {length} tokens: there must be one at least")
