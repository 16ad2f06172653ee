"""Train, valid and test: three disjoint ranges of documents.

A run reads the first two. What is kept for a test afterwards may be shorter than a sample: then it has no samples.
"""

from __future__ import annotations

from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.errors import DataError

SPLITS = ("train", "valid", "test")
READ = SPLITS[:2]
"""Those of which a run makes samples."""
DocumentRange = tuple[int, int]


def parse_split(split: str) -> tuple[float, float, float]:
    """``"949,50,1"`` -> the three fractions, summing to 1. Fewer than three weights mean 0 for the rest."""
    try:
        weights = [float(part) for part in split.split(",")]
    except ValueError:
        weights = []
    if not 1 <= len(weights) <= 3 or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise DataError(
            f"split={split!r} is not one to three weights for {', '.join(SPLITS)}; write for example '949,50,1'"
        )
    weights += [0.0] * (3 - len(weights))
    total = sum(weights)
    return weights[0] / total, weights[1] / total, weights[2] / total


def split_documents(dataset: IndexedDataset, split: str, sequence_length: int) -> dict[str, DocumentRange | None]:
    """``{"train": (start, stop), "valid": ..., "test": ...}``: documents ``start <= i < stop``; None for weight 0, and
    for a test split without one sample.

    Args:
        dataset: what is split where the *tokens* have the wanted proportions (documents may be very uneven, and are
            never cut).
        split: weights, see :func:`parse_split`.
        sequence_length: train and valid must hold one sample, ``sequence_length + 1`` tokens.

    Raises:
        DataError: train or valid has a weight and is too short for one sample; the message says what would do.
    """
    fractions = parse_split(split)
    cuts = [0]
    for index in range(3):
        cuts.append(max(cuts[-1], _cut(dataset, sum(fractions[: index + 1]))))
    # Rounding must not leave a document to a split of weight 0, or to none.
    last = max(index for index in range(3) if fractions[index])
    cuts[last + 1 :] = [dataset.num_documents] * (3 - last)
    ranges: dict[str, DocumentRange | None] = {}
    for name, fraction, start, stop in zip(SPLITS, fractions, cuts[:-1], cuts[1:]):
        tokens = dataset.document_start(stop) - dataset.document_start(start)
        enough = tokens > sequence_length
        ranges[name] = (start, stop) if fraction and enough else None
        if fraction and not enough and name != "test":
            needed = (sequence_length + 1) / dataset.num_tokens
            if needed > 1:
                way_out = f"Use sequence_length <= {dataset.num_tokens - 1}, or more data"
            elif fraction >= needed:
                way_out = f"Its documents are too few to cut there: use more data, or give {name} weight 0"
            else:
                shorter = max(1, int(fraction * dataset.num_tokens) - 1)
                way_out = (
                    f"Give {name} at least {needed:.2%} of the weight (it has {fraction:.2%}) and somewhat more for "
                    f"whole documents, give it weight 0, or use sequence_length <= {shorter}"
                )
            raise DataError(
                f"split={split!r} leaves {stop - start} documents with {tokens} tokens of {dataset.prefix} for {name}, "
                f"but one sample takes sequence_length + 1 = {sequence_length + 1} tokens. The dataset has "
                f"{dataset.num_documents} documents and {dataset.num_tokens} tokens. {way_out}"
            )
    return ranges


def _cut(dataset: IndexedDataset, fraction: float) -> int:
    wanted = fraction * dataset.num_tokens
    document = dataset.document_of(min(int(wanted), dataset.num_tokens - 1))
    before, after = dataset.document_start(document), dataset.document_start(document + 1)
    return document if wanted - before < after - wanted else document + 1
