"""A SentencePiece model as a ``tokenizer.json``, so that ``transformers`` gives its very ids.

(``transformers`` 5.23 reads a bare ``tokenizer.model`` as BPE with Llama's rules even where it is a unigram model
with other ones, and then tokenises differently without a word.) The result is compared with the original on
:data:`PROBES`, and on the model's user-defined symbols in a text, before anyone sees it. What remains: where two ways
of cutting a word are equally likely within rounding under a unigram model, the two libraries may choose differently (in
4 of 300 source files), and NFKC may leave a mark behind that no composed character has.
"""

from __future__ import annotations

from typing import Any

from megatron_ds.data.tokenizer_base import merges_of
from megatron_ds.errors import DataError

PROBES = (
    "The quick brown fox, 1234567 times.",
    " leading and  double   spaces ",
    "def f(x):\n\treturn {x: 'y'}\r\n",
    "naïve café — Ελληνικά, русский, 日本語, 한국어, العربية",
    "🙂🏽 ½ ﬁ \uff21\uff22 e\u0301 \u200b\u2028 \u1112\u1161\u11ab a\u0302\u0301",
    "a▁b",
    "x",
    "f(a, b) --> 0.5e-3",
    "<0x41>",
)


def to_tokenizers(processor: Any) -> Any:
    """A ``tokenizers.Tokenizer`` with the ids of a ``sentencepiece.SentencePieceProcessor``.

    Raises:
        DataError: it could not be made to give the same ids on the probes.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    proto = sentencepiece_model_pb2.ModelProto.FromString(processor.serialized_model_proto())
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if trainer.model_type == trainer.UNIGRAM:
        model: Any = models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    elif trainer.model_type == trainer.BPE:
        vocabulary = {piece: token for token, (piece, _) in enumerate(pieces)}
        # SentencePiece's BPE joins the neighbours whose joined piece has the best score.
        normal = {piece.piece: token for token, piece in enumerate(proto.pieces) if piece.type == piece.NORMAL}
        merges = merges_of(normal, lambda piece: -proto.pieces[normal[piece]].score)
        unknown = pieces[trainer.unk_id][0]
        model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback)
    else:
        raise DataError(f"a SentencePiece model of type {trainer.model_type} has no tokenizer.json")
    backend = Tokenizer(model)
    steps: list[Any] = []
    if "nfkc" in rules.name:  # Precompiled forgets the marks of many a decomposed character
        steps.append(normalizers.NFC())
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    if rules.escape_whitespaces:
        steps.append(normalizers.Replace(" ", "▁"))
    backend.normalizer = normalizers.Sequence(steps)
    if trainer.model_type == trainer.UNIGRAM and trainer.byte_fallback:
        # "<0x41>" in a text is six letters, of which Unigram would make the piece of that byte.
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("(?<=<0x[0-9A-F])(?=[0-9A-F]>)"), "isolated")
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(undo)
    for piece in proto.pieces:
        if piece.type in (piece.CONTROL, piece.UNKNOWN):
            backend.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == piece.USER_DEFINED:
            backend.add_tokens([AddedToken(piece.piece, normalized=False)])
    # Behind a symbol `tokenizers` begins anew: it strips spaces there, and puts another one in front.
    own = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    for text in (*PROBES, *(f"1{piece}a {piece} b{piece}" for piece in own)):
        theirs, ours = processor.EncodeAsIds(text), backend.encode(text, add_special_tokens=False).ids
        if theirs != ours:
            raise DataError(
                f"this SentencePiece model has no tokenizer.json with the same ids: {text!r} is {theirs} with "
                f"sentencepiece and {ours} converted. Use tokenizer.model with sentencepiece itself"
            )
    return backend
