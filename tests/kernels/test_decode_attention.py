"""Attention of texts' last tokens, block by block, beside torch's over each text's own keys."""

from __future__ import annotations

import pytest
import torch

from megatron_ds.kernels.cpu.decode_attention import DecodedBlocks, decode_attention


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 2.0)])
def test_each_text_is_attended_to_as_if_alone(window: int | None, softcap: float | None) -> None:
    """Of 1 to 14 keys, blocks of which lie anywhere; a window may hide whole blocks. What others hold is not read."""
    torch.manual_seed(0)
    size, places = 4, [0, 3, 4, 13]
    tables = [[7], [2], [5, 1], [9, 0, 8, 3]]
    keys, values = torch.full((2, 10, 2, size, 8), float("nan"), dtype=torch.float64)
    q = torch.randn(4, 6, 8, dtype=torch.float64)
    blocks = [block for table in tables for block in table]
    for cache in (keys, values):
        cache[blocks] = torch.randn(len(blocks), 2, size, 8, dtype=torch.float64)
    texts = [text for text, table in enumerate(tables) for _ in table]
    firsts = [size * column for table in tables for column in range(len(table))]
    of_text = [[0, 0, 0, 0], [1, 1, 1, 1], [2, 3, 3, 3], [4, 5, 6, 7]]
    at = DecodedBlocks(*(torch.tensor(numbers) for numbers in (places, blocks, texts, firsts, of_text)))
    found = decode_attention(q, keys, values, at, window, softcap)
    for text, (place, table) in enumerate(zip(places, tables)):
        first = 0 if window is None else max(0, place - window + 1)
        k, v = (
            cache[table].transpose(0, 1).flatten(1, 2)[:, first : place + 1].repeat_interleave(3, 0)
            for cache in (keys, values)
        )
        scores = (k @ q[text].unsqueeze(2)).squeeze(2) / 8**0.5
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        want = (scores.softmax(1).unsqueeze(1) @ v).squeeze(1)
        torch.testing.assert_close(found[text], want, rtol=0, atol=1e-12)
