"""Runs with tokenizers that were not made here: exported, loaded as a user would, generated from, and imported again."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from em_megatron.data.manifest import DataError
from em_megatron.data.vocabulary import Vocabulary
from em_megatron.evaluation.generation import Sampling
from em_megatron.hf.fast_tokenizer import fast_tokenizer
from em_megatron.hf.generation import TransformersText
from launch import export_hf, import_hf
from tests.data import made_tokenizers as made
from tests.hf.made_runs import made_run


def run_with(vocabulary: Vocabulary, folder: Path) -> Path:
    """A run as training leaves it: the tokenizer under its own name."""
    run = made_run(folder, vocabulary.path)
    (run / "tokenizer.model").unlink()
    (run / vocabulary.file_name).write_bytes(vocabulary.serialized)
    return run


@pytest.mark.parametrize("kind", ["GPT-2", "NFC", "Llama 2", "Metaspace"])
def test_a_hugging_face_tokenizer_goes_there_and_back(kind, tmp_path, capsys):
    tokenizer = made.byte_level(kind) if kind in made.BYTE_LEVEL else made.space_marked(kind)
    vocabulary = Vocabulary(made.saved(tokenizer, tmp_path / "tokenizer"))
    run = run_with(vocabulary, tmp_path / "run")
    assert export_hf.main([str(run), str(tmp_path / "out")]) == 0
    assert "none got other ids" in capsys.readouterr().out
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    for text in (made.made_text(300, seed=5), "<|endoftext|> x </s>\n\n  y", "e\u0301 \u2581 \U0001f642"):
        ids = vocabulary.encode(text)
        assert theirs.encode(text) == [vocabulary.bos_id, *ids]
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == tokenizer.decode(ids)
    found = [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id]
    assert found == [vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id]
    text = TransformersText(tmp_path / "out")
    text.read("some text")
    assert isinstance("".join(text.write(5, Sampling(temperature=0))), str)
    assert import_hf.main([str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    assert (tmp_path / "back/tokenizer.json").read_bytes() == vocabulary.serialized
    assert not (tmp_path / "back/tokenizer.model").exists()


def test_a_llama_style_model_brings_its_tokenizer(tmp_path):
    folder = made.saved(made.byte_level(), tmp_path / "llama", eos_token="<|endoftext|>")
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=400, **small)).save_pretrained(folder)
    assert import_hf.main([str(folder), str(tmp_path / "run"), "memory.block_length=16"]) == 0
    assert (tmp_path / "run/tokenizer.json").read_bytes() == Vocabulary(folder).serialized


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("kind", [kind for kind in made.SENTENCEPIECE if kind != "suffix"])
def test_a_foreign_sentencepiece_model_becomes_a_fast_tokenizer(kind, model_type, tmp_path):
    vocabulary = Vocabulary(made.sentencepiece_model(tmp_path / "m", model_type, **made.SENTENCEPIECE[kind]))
    fast_tokenizer(vocabulary).save_pretrained(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    text = " ".join(made.made_text(300, seed=5).split())
    name = "" if kind == "no bytes" else "<s>"  # "<" is cut off, and unknown characters are one id only side by side
    for odd in (text, "", "  two  spaces ", "e\u0301 \ufb01 \uff21\u3000x \U0001f642", name):
        assert theirs.encode(odd) == [vocabulary.bos_id, *vocabulary.encode(odd)]
    assert theirs.decode(vocabulary.encode(text)) == text


def test_spaces_at_the_end_of_words_have_no_counterpart(tmp_path):
    vocabulary = Vocabulary(made.sentencepiece_model(tmp_path / "m", **made.SENTENCEPIECE["suffix"]))
    with pytest.raises(DataError, match=r"puts spaces at the end of words .* cannot be exported"):
        fast_tokenizer(vocabulary)


def test_a_run_with_a_foreign_sentencepiece_model_is_exported(tmp_path, capsys):
    path = made.sentencepiece_model(tmp_path / "tokenizer.model", **made.SENTENCEPIECE["dummy prefix"])
    run = made_run(tmp_path / "run", path)
    assert export_hf.main([str(run), str(tmp_path / "out")]) == 0
    assert "none got other ids" in capsys.readouterr().out
    assert (tmp_path / "out/tokenizer.model").read_bytes() == path.read_bytes()
