"""``LLM`` against `transformers`, and as a user calls it: folders, checkpoints, texts, conversations, mistakes."""

from __future__ import annotations

import gc
import io
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hf_models import FAMILIES, MODELS, _llama, make
from safetensors.torch import load_file
from served import config_of
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

from megatron_ds.checkpoint import Checkpoint, FlatShard, save
from megatron_ds.convert.hugging_face import export_hf, import_hf
from megatron_ds.data.tokenizers import ByteTokenizer, load_tokenizer
from megatron_ds.errors import CheckpointError, ConfigError, MegatronDSError
from megatron_ds.inference import LLM, RequestOutput, SamplingParams, ranks
from megatron_ds.inference import llm as llm_module
from megatron_ds.inference.served_model import require_split

REFUSED = {
    **dict.fromkeys(("bert", "bert-pretraining", "roberta", "modernbert"), "no decoder"),
    **dict.fromkeys(
        ("llama-dynamic", "llama-longrope", "phi3-mini-128k", "phi3-medium-short", "phi4-mini-long"),
        "turns all keys anew",
    ),
}
DECODERS = sorted({**MODELS, **FAMILIES}.keys() - REFUSED)
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)


def prompts(vocab: int = 131) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab, (length,), generator=draw).tolist() for length in (5, 17)]


def by_transformers(model: Any, tokens: list[int], count: int) -> list[int]:
    """Token by token over the whole text: their cache and their masks have no part in it."""
    text = list(tokens)
    with torch.no_grad():
        for _ in range(count):
            text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(tokens) :]


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_answers_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    theirs = make(name)
    theirs.save_pretrained(tmp_path)
    with LLM(tmp_path, block_size=8, max_num_batched_tokens=80) as llm:
        found = llm.generate(prompts(), GREEDY, use_tqdm=False)
    for tokens, output in zip(prompts(), found, strict=True):
        assert output.outputs[0].token_ids == by_transformers(theirs, tokens, GREEDY.max_tokens or 0)


@pytest.mark.parametrize(("name", "why"), REFUSED.items())
def test_what_cannot_be_served_is_refused(tmp_path: Path, name: str, why: str) -> None:
    make(name).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=why):
        LLM(tmp_path)


# --- as a user calls it -------------------------------------------------------------------------------------------

VOCAB = 257


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of bytes with what comes with a published model."""
    path = tmp_path_factory.mktemp("model")
    model = _llama(
        vocab_size=VOCAB, max_position_embeddings=128, bos_token_id=None, eos_token_id=256, num_key_value_heads=2
    )
    model.save_pretrained(path)
    ByteTokenizer().save_hf(path)
    (path / "generation_config.json").write_text('{"eos_token_id": [256, 10]}')
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}:")
    return path


def answers(outputs: list[RequestOutput]) -> list[list[int]]:
    return [sample.token_ids for output in outputs for sample in output.outputs]


def test_ranks_that_the_first_one_starts_give_the_same_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each has half of every block, in its part of the machine's memory."""
    monkeypatch.setattr(llm_module, "free_host_memory", lambda: 1 << 18)
    params = SamplingParams(seed=1, max_tokens=8, n=2)
    with LLM(folder) as one:
        blocks = one.engine.batcher.pool.count
        want = answers(one.generate(["abc", "de"], params, use_tqdm=False))
    with pytest.raises(ConfigError, match="ended with exit code -9"), LLM(folder, tensor_parallel_size=2) as two:
        assert two.engine.batcher.pool.count == blocks < 64 * 4
        with pytest.raises(ConfigError, match="another LLM of this process is served on several ranks; close it first"):
            LLM(folder, tensor_parallel_size=2)
        assert answers(two.generate(["abc", "de"], params, use_tqdm=False)) == want
        other = two._ranks._children[0]
        other.kill()
        other.wait()


def test_a_rank_that_ends_before_it_has_begun_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def start(rank: int, *_: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", ["import time; time.sleep(600)", "exit(3)"][rank - 1]]))
        return started[-1]

    monkeypatch.setattr(ranks, "_start", start)
    with pytest.raises(ConfigError, match="ended with exit code 3"):
        LLM(folder, pipeline_parallel_size=3)
    assert [child.returncode for child in started] == [-9, 3]


def test_a_model_for_which_there_is_no_memory_leaves_no_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would wait for the first one for ever, and so would a second try in this process for them."""
    others = with_another_rank(monkeypatch)
    with pytest.raises(ConfigError, match="there is memory for 0 blocks"):
        LLM(folder, gpu_memory_utilization=1e-12)
    assert others[0].returncode == -9


def test_ctrl_c_within_a_step_ends_the_other_ranks_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = with_another_rank(monkeypatch)
    with pytest.raises(KeyboardInterrupt), LLM(folder) as llm:
        monkeypatch.setattr(llm.engine, "_step", Mock(side_effect=KeyboardInterrupt))
        began = time.monotonic()
        llm.generate("a", use_tqdm=False)
    assert others[0].returncode == -9 and time.monotonic() - began < 20  # else they are given 30 s to end by themselves
    llm._ranks._children, llm._ranks.mesh = [], Mock(**{"world.size": 2, "rank": 0})
    with pytest.raises(ConfigError, match="a step was interrupted, and the other ranks wait in the middle of it"):
        llm.generate("a", use_tqdm=False)


def with_another_rank(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Let a served model have started one more, which waits."""
    real, others = ranks.Ranks.__init__, []

    def init(self: ranks.Ranks, options: Any) -> None:
        real(self, options)
        others.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        self._children += others

    monkeypatch.setattr(ranks.Ranks, "__init__", init)
    return others


def test_a_checkpoint_is_served_as_the_folder_that_it_came_from(folder: Path, tmp_path: Path) -> None:
    import_hf(folder, tmp_path / "run")
    params = SamplingParams(temperature=0.0, max_tokens=12)
    with LLM(folder) as theirs, LLM(tmp_path / "run") as ours:
        assert ours.max_model_len == theirs.max_model_len == 128
        assert ours.engine.ends.eos == theirs.engine.ends.eos == (256, 10)
        want = answers(theirs.generate("what", params, use_tqdm=False))
        assert answers(ours.generate("what", params, use_tqdm=False)) == want
        assert answers(ours.chat([{"role": "user", "content": "what"}], params, use_tqdm=False)) == answers(
            theirs.generate("what:", params, use_tqdm=False)
        )
        with pytest.raises(ConfigError, match="the chat template shows no tools; leave tools out"):
            ours.texts.render_chat([{"role": "user", "content": "what"}], [{"type": "function"}])


def test_a_run_with_a_moving_average_is_served_and_exported_by_it(folder: Path, tmp_path: Path) -> None:
    first = import_hf(folder, tmp_path / "first")
    with Checkpoint(first) as source:
        weights = {name: source.read(name) for name in source.names()}
        meta = source.meta
    last = {name: torch.randn_like(weight) for name, weight in weights.items()}
    kinds = (("param", last), ("ema", weights))
    shards = [FlatShard.whole(name, kind, weight) for kind, of in kinds for name, weight in of.items()]
    save(tmp_path / "first", 1, shards, meta)
    params = SamplingParams(temperature=0.0, max_tokens=12)
    with LLM(folder) as theirs, LLM(tmp_path / "first") as ours:
        want = answers(theirs.generate("what", params, use_tqdm=False))
        assert answers(ours.generate("what", params, use_tqdm=False)) == want
    for average, expected in ((None, weights), (True, weights), (False, last)):
        exported = export_hf(tmp_path / "first", tmp_path / f"hf-{average}", average=average)
        there = load_file(exported / "model.safetensors")
        assert torch.equal(there["model.norm.weight"], expected["final_norm.weight"])
    with pytest.raises(CheckpointError, match=r"keeps no moving average; train with optimizer\.ema_decay"):
        export_hf(first, tmp_path / "none", average=True)


def test_a_stream_grows_into_the_whole_answer(folder: Path) -> None:
    params = SamplingParams(seed=4, max_tokens=20, ignore_eos=True)
    with LLM(folder) as llm:
        (whole,) = llm.generate("ab", params, use_tqdm=False)
        seen = [output.outputs[0].text for output in llm.stream("ab", params)]
        assert seen[-1] == whole.outputs[0].text and len(seen) == 20
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))
        next(llm.stream("ab", params))  # left in the middle
        gc.collect()
        llm.step()
        assert not llm.engine.has_work and llm.engine.batcher.pool.free == llm.engine.batcher.pool.count


@pytest.mark.parametrize("share", [True, False])
def test_beginnings_are_computed_once_unless_told_not_to(folder: Path, share: bool) -> None:
    with LLM(folder, block_size=4, num_blocks=32, enable_prefix_caching=share) as llm:
        first, again = (llm.generate(prompts()[1], GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert (first.cached, again.cached) == (0, 16 if share else 0)
    assert first.outputs[0].token_ids == again.outputs[0].token_ids


def test_prompts_come_as_texts_tokens_and_dictionaries(folder: Path) -> None:
    with LLM(folder) as llm:
        tokens = llm.texts.tokenize("import os")
        params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
        of_text = {"prompt": "import os"}
        forms: list[Any] = ["import os", of_text, tokens, {"prompt_token_ids": tokens}, np.array(tokens)]
        for number, form in enumerate([*forms, torch.tensor([tokens])]):
            (output,) = llm.generate(form, params, use_tqdm=False)
            assert (output.prompt_token_ids, output.prompt) == (tokens, "import os" if number < 2 else None)
        assert len({tuple(o.outputs[0].token_ids) for o in llm.generate(forms, params, use_tqdm=False)}) == 1
        for wrong in ({"multi_modal_data": 1, "prompt": "a"}, {}, [["a"]], [[1.5]]):
            with pytest.raises(ConfigError, match="a prompt is a text"):
                llm.generate(wrong, params)


def test_without_settings_the_models_own_ones_are_taken(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    said = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.5}
    more = {"do_sample": True, "max_new_tokens": 2, "min_p": None}  # of which one is no matter of drawing
    (tmp_path / "generation_config.json").write_text(json.dumps({**said, **more}))
    with LLM(tmp_path, seed=3) as own, LLM(tmp_path, seed=3, generation_config="none") as plain:
        found = answers(own.generate("ab", use_tqdm=False))
        assert found == answers(plain.generate("ab", SamplingParams(**said), use_tqdm=False))
        (streamed,) = [output for output in own.stream("ab") if output.finished]
        assert answers([streamed]) == found
        neutral = answers(plain.generate("ab", use_tqdm=False))
        assert neutral == answers(own.generate("ab", SamplingParams(), use_tqdm=False)) != found
    (tmp_path / "generation_config.json").write_text('{"top_p": 2}')
    with pytest.raises(
        ConfigError, match=r"generation_config.json: top_p=2: Input should be less than or equal to 1; mend it"
    ):
        LLM(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"no_repeat_ngram_size": 3, "num_beams": 1, "min_length": 0}')
    with pytest.raises(ConfigError, match=r"no_repeat_ngram_size=3 changes .* and is not served here; remove it, or"):
        LLM(tmp_path)


def test_what_counts_of_both_files_is_what_counts_for_transformers(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    said = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**said, "top_k": 3, "min_length": 4, "eos_token_id": 255}))
    (tmp_path / "generation_config.json").unlink()
    of_config = GenerationConfig.from_model_config(LlamaConfig.from_pretrained(tmp_path))
    with LLM(tmp_path) as llm:
        assert llm.suggested == {} and (of_config.top_k, of_config.min_length) == (None, None)
        # The tokenizer's own end beside the model's, as vLLM has it: models of conversations need it.
        assert llm.engine.ends.eos == (of_config.eos_token_id, 256)


def test_a_prompt_of_sentencepiece_begins_and_ends_as_its_folder_says(folder: Path, tmp_path: Path) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["hello world how are you"] * 9), model_writer=model, vocab_size=290, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with LLM(folder) as llm:
        for begins, ends in itertools.product((True, False), repeat=2):
            said = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": begins, "add_eos_token": ends}
            names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            (tmp_path / "tokenizer_config.json").write_text(json.dumps({**said, **names}))
            llm.texts.tokenizer = load_tokenizer(tmp_path)
            text = "hello you</s>"
            assert llm.texts.tokenize(text) == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]


def test_a_text_may_be_as_long_as_yarn_scales_it(tmp_path: Path) -> None:
    """As Qwen's cards say to switch it on: `max_position_embeddings` stays what it was."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    theirs = _llama(max_position_embeddings=16, rope_parameters=yarn)
    theirs.save_pretrained(tmp_path)
    tokens = [*itertools.islice(itertools.cycle(range(3, 100, 7)), 40)]
    with LLM(tmp_path) as llm:
        assert llm.max_model_len == 64
        (output,) = llm.generate([tokens], GREEDY, use_tqdm=False)
    assert output.outputs[0].token_ids == by_transformers(theirs, tokens, 10)


def test_an_answer_ends_at_every_end_of_the_model(folder: Path) -> None:
    with LLM(folder) as llm:
        bias = SamplingParams(temperature=0.0, logit_bias={10: 100.0}, max_tokens=5)
        (output,) = llm.generate("ab", bias, use_tqdm=False)
        assert output.outputs[0].token_ids == [10] and output.outputs[0].finish_reason == "stop"
        later = SamplingParams(temperature=0.0, logit_bias={10: 100.0}, max_tokens=5, min_tokens=3)
        (output,) = llm.generate("ab", later, use_tqdm=False)
        ids = output.outputs[0].token_ids
        assert len(ids) == 4 and ids[-1] == 10 and 10 not in ids[:3]
        for included, text in ((False, ""), (True, "a")):
            more = {"stop_token_ids": [97], "include_stop_str_in_output": included}
            (output,) = llm.generate(
                "x", SamplingParams(temperature=0.0, logit_bias={97: 100.0}, **more), use_tqdm=False
            )
            assert (output.outputs[0].text, output.outputs[0].stop_reason) == (text, 97)
        stop = SamplingParams(temperature=0.0, logit_bias={97: 100.0}, max_tokens=9, min_tokens=3, stop=["aa"])
        (output,) = llm.generate("ab", stop, use_tqdm=False)
        assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("aa", "aa")
        assert output.outputs[0].token_ids == [97] * 4


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"dtype": "int3"}, "dtype='int3'"),
        ({"max_model_len": 5000}, "max_model_len=5000: the model was made for 2 to 128"),
        ({"tensor_parallel_size": 5}, "cannot be split over tensor_parallel_size=5; tp may be 1, 2 or 6"),
        ({"num_blocks": 1}, "no text of 128 tokens"),
        ({"max_num_batched_tokens": 20}, "max_num_batched_tokens=20 is less than"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"tp": 2}, "tp=2: .*; did you mean 'tensor_parallel_size'"),
        ({"max_model_length": 2}, "did you mean 'max_model_len'"),
        ({"tokenizer": "/nowhere"}, "does not exist"),
    ],
)
def test_settings_that_cannot_be_served_say_what_can(folder: Path, settings: dict[str, Any], what: str) -> None:
    with pytest.raises(MegatronDSError, match=what):
        LLM(folder, **settings)


def test_a_folder_without_a_model_and_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MegatronDSError, match="no checkpoint"):
        LLM(tmp_path)
    _llama().save_pretrained(tmp_path / "bare")
    with LLM(tmp_path / "bare") as llm:
        with pytest.raises(ConfigError, match="has no tokenizer"):
            llm.generate("text", use_tqdm=False)
        with pytest.raises(ConfigError, match="prompt is empty"):
            llm.generate([[]], use_tqdm=False)
        for no_tokens in ([3.7], ["5"]):  # int() would make tokens of them
            with pytest.raises(ConfigError, match=r"whole numbers: .* cannot be interpreted as an integer"):
                llm.generate([no_tokens], use_tqdm=False)
        assert len(llm.generate([5, 6], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 10


@pytest.mark.parametrize("width", [1, 3])
def test_heads_that_cannot_be_turned_are_refused_before_anything_is_computed(width: int, tmp_path: Path) -> None:
    _llama(head_dim=width).save_pretrained(tmp_path / "odd")
    with pytest.raises(ConfigError, match=f"rotary positions need an even head_dim, not {width}; use 2"):
        LLM(tmp_path / "odd")


def test_all_ranks_of_a_machine_are_on_gpus_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for count, kind in ((1, "cuda"), (2, "cuda"), (3, "cpu")):
        assert {ranks._device("auto", rank, count).type for rank in range(count)} == {kind}
    with pytest.raises(ConfigError, match="device='cuda', but 3 ranks have 2 GPUs"):
        ranks._device("cuda", 0, 3)


def test_a_norm_over_all_key_heads_goes_to_no_more_ranks_than_there_are() -> None:
    config = config_of("llama").model_copy(update={"qk_norm": True, "qk_norm_over": "projection"})
    require_split(config, 2, 1)
    with pytest.raises(ConfigError, match="kv_heads=2 are fewer than tensor_parallel_size=4, and the norm over all"):
        require_split(config, 4, 1)
