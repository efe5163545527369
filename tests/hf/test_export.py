"""Checkpoints of every layout become one and the same Hugging Face folder, compared with Megatron, or nothing."""

from __future__ import annotations

import json
import math
import random
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from em_megatron.evaluation.generation import MegatronText, Sampling
from em_megatron.hf import export, weight_mapping
from em_megatron.hf.generation import TransformersText
from em_megatron.hf.verification import Comparison, Computed, compare
from em_megatron.parallel.process_groups import shutdown
from em_megatron.training.restore import restore
from launch import export_hf
from tests.hf.made_runs import KINDS, SLOW, VARIANTS, config_of, made_run, write_from_layout
from tests.training import corpora

LAYOUTS = {
    "tensor": ["parallel.tensor_model_parallel_size=2"],
    "pipeline": ["parallel.pipeline_model_parallel_size=2"],
    "interleaved": ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
    "context": ["parallel.context_parallel_size=2", "data.sequence_length=160"],
    "data": [],
}


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("variant", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in VARIANTS])
def test_export_computes_what_megatron_computes(variant, tokenizer, tmp_path, capsys):
    run = made_run(tmp_path / "run", tokenizer, *VARIANTS[variant])
    assert export_hf.main([str(run), str(tmp_path / "out")]) == 0  # compares within 1e-4, over more than three blocks
    said = capsys.readouterr().out
    assert "56 tokens: logits differ by at most" in said
    assert "none got other ids" in said
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= files_of(tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text().partition("## Training")[0]
    assert ("HiPPO" in card) == (variant not in KINDS and variant != "no memory")
    assert ("whatever its length" in card) == (variant not in ("full", "subsample"))
    assert not list(tmp_path.glob(".*"))
    dtype = torch.bfloat16 if variant == "bf16" else torch.float32
    assert {weight.dtype for weight in load_file(tmp_path / "out/model.safetensors").values()} == {dtype}


@pytest.mark.parametrize(
    "layout", [pytest.param(x, marks=pytest.mark.slow) if x in ("pipeline", "data") else x for x in LAYOUTS]
)
def test_every_layout_exports_the_same_bytes(layout, ranks, tokenizer, exported, tmp_path):
    ranks(2).run(write_from_layout, tmp_path / "run", tokenizer, LAYOUTS[layout])
    source = export.open_checkpoint(tmp_path / "run", [])
    export.write_weights(source, tmp_path, 10**9, lambda _: None)
    assert (tmp_path / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


def test_a_tokenizer_of_unrounded_scores_is_exported_with_a_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tokenizer.train.rounded_scores", lambda serialized: serialized)
    run = made_run(tmp_path / "run", corpora.tokenizer(tmp_path))
    letters = random.Random(0)
    (tmp_path / "text.txt").write_text("\n".join("".join(letters.choices("abcd ", k=500)) for _ in range(400)))
    assert export_hf.main([str(run), str(tmp_path / "out"), "--text", str(tmp_path / "text.txt")]) == 0
    assert "warning: where this tokenizer was trained without rounded scores" in capsys.readouterr().out
    assert "none got other token ids" not in (tmp_path / "out/README.md").read_text()


def test_files_by_size_and_their_index(run_folder, exported, tmp_path):
    assert export_hf.main([str(run_folder), str(tmp_path / "out"), "--max-shard-size", "40K"]) == 0
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    whole = load_file(exported / "model.safetensors")
    assert set(index["weight_map"]) == set(whole)
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in whole.values())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        for name, weight in load_file(file).items():
            assert index["weight_map"][name] == file.name
            assert torch.equal(weight, whole[name])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_in_another_dtype(dtype, run_folder, exported, tmp_path):
    assert export_hf.main([str(run_folder), str(tmp_path / "out"), "--dtype", dtype]) == 0
    for name, weight in load_file(tmp_path / "out/model.safetensors").items():
        assert torch.equal(weight, load_file(exported / "model.safetensors")[name].to(weight.dtype))


def test_rows_without_a_token_are_kept_and_never_generated(tokenizer, tmp_path):
    run = made_run(tmp_path / "run", tokenizer, "model.make_vocab_size_divisible_by=96")  # 640 ids in 672 rows
    assert export_hf.main([str(run), str(tmp_path / "out")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.lm_head.weight.shape[0] == 672
    assert model.generation_config.suppress_tokens == list(range(640, 672))
    with torch.no_grad():
        model.lm_head.weight[640:] *= 100
    ids = torch.randint(4, 640, (1, 20))
    written = model.generate(ids, max_new_tokens=30, do_sample=True)[0, 20:]
    assert written.max() < 640
    model.resize_token_embeddings(642)  # two tokens more
    assert model.generation_config.suppress_tokens == list(range(642, 672))
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}.items() <= generation.items()


def test_two_exports_to_one_place_do_not_mix(run_folder, tmp_path, capsys, monkeypatch):
    write = export.write_tokenizer

    def write_and_export_again(source, folder):
        monkeypatch.setattr(export, "write_tokenizer", write)
        assert export_hf.main([str(run_folder), str(tmp_path / "out")]) == 0
        write(source, folder)

    monkeypatch.setattr(export, "write_tokenizer", write_and_export_again)
    assert export_hf.main([str(run_folder), str(tmp_path / "out")]) == 2  # the second one was first
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert (tmp_path / "out/config.json").is_file()
    assert not list(tmp_path.glob(".*"))


def test_a_difference_of_states_alone_is_an_error():
    for found in (Comparison(9, 0.0, 1.0), Comparison(9, 1.0, 0.0), Comparison(9, 0.0, math.nan)):
        with pytest.raises(weight_mapping.ConversionError, match="computes something else"):
            found.check()
    Comparison(9, 1e-5, 1e-5).check()
    good, bad = torch.ones(4, 2, 6), torch.full((4, 2, 6), math.nan)
    both = (
        Computed(torch.ones(9, 5), {0: good, 1: good, 2: good}),
        Computed(torch.ones(9, 5), {0: good, 1: bad, 2: good}),
    )
    assert math.isnan(compare(*both).states)


def test_another_reader_in_the_export(run_folder, tmp_path):
    assert export_hf.main([str(run_folder), str(tmp_path / "out"), "memory.order=6", "memory.sampler=exponential"]) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["memory_order"], config["memory_sampler"]) == (6, "exponential")
    card = (tmp_path / "out/README.md").read_text()
    assert "order 6, 5 slots, exponential" in card
    assert (next(run_folder.glob("checkpoints/*")) / "config.yaml").read_text() in card


def test_readers_that_a_kind_does_not_have(tokenizer, tmp_path, capsys):
    run = made_run(tmp_path / "run", tokenizer, *VARIANTS["memorizing, top-k"])
    refused([str(run), "memory.order=6"], "no place in a memory of kind 'memorizing'", capsys, tmp_path / "out")
    assert export_hf.main([str(run), str(tmp_path / "out"), "memory.pairs=9", "memory.top_k=0"]) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["memory_pairs"], config["memory_top_k"]) == (9, 0)
    refused([str(run), "memory.update=delta"], "no place in an export", capsys, tmp_path / "other")


def test_greedy_text_is_megatrons(run_folder, exported):
    greedy, prompt = Sampling(temperature=0), "abcdef ghi " * 3
    run = restore(run_folder, [], 1)
    theirs = TransformersText(exported)
    here = MegatronText(run.model[0], run.vocabulary)
    here.read(prompt)
    expected = list(here.write_ids(200, greedy))
    shutdown()
    theirs.read(prompt)
    ids = torch.tensor([theirs.waiting])
    found = theirs.model.generate_from(theirs.cache, ids, max_new_tokens=200, do_sample=False)[0, 1:].tolist()
    assert len(expected) > 100  # more than six block ends
    assert found[: len(expected)] == expected
    assert "".join(theirs.write(200, greedy)) == run.vocabulary.decode(expected)


def test_the_card_says_what_was_measured(exported, run_folder):
    card = (exported / "README.md").read_text()
    for words in (
        "| parameters | 71,968 |",
        "reimplementation",
        "trust_remote_code=True",
        "largest difference of a logit",
        "not measured",
        "Step 7",
    ):
        assert words in card


def test_the_code_of_the_card_runs(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "document.txt").write_text("abc def ghi\n" * 20)
    code = (exported / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(compile(code.replace("FOLDER", str(exported)), "card", "exec"), {})
    assert "Once upon a time" in capsys.readouterr().out


def refused(arguments: list[str], words: str, capsys, out: Path) -> None:
    assert export_hf.main([*arguments[:1], str(out), *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))


def test_weights_without_rows_and_rows_without_weights(tokenizer, tmp_path, capsys):
    fewer, more = config_of("model.num_layers=3"), config_of("model.num_layers=5")
    for name, saved_as, words in (("a", fewer, "have no row"), ("b", more, "are missing")):
        run = made_run(tmp_path / name, tokenizer, saved_as=saved_as)
        refused([str(run)], words, capsys, tmp_path / "out")
    run = made_run(tmp_path / "c", tokenizer, saved_as=config_of("model.ffn_hidden_size=40"))
    refused([str(run)], "instead of", capsys, tmp_path / "out")


@pytest.mark.parametrize("mistake", ["gate and way up exchanged", "rotary base", "key and value exchanged"])
def test_a_wrong_conversion_leaves_nothing(mistake, run_folder, tmp_path, capsys, monkeypatch):
    convert, configure = weight_mapping.to_hugging_face, export.hugging_face_config

    def wrong(row, weight, shape):
        parts = convert(row, weight, shape)
        if row.layout == {"gate and way up exchanged": "gated", "key and value exchanged": "qkv"}.get(mistake):
            names = list(parts)
            parts[names[-1]], parts[names[-2]] = parts[names[-2]], parts[names[-1]]
        return parts

    def wrong_base(*arguments):
        config = configure(*arguments)
        config.rope_theta = 9000.0
        return config

    monkeypatch.setattr(export, "to_hugging_face", wrong)
    if mistake == "rotary base":
        monkeypatch.setattr(export, "hugging_face_config", wrong_base)
    refused([str(run_folder)], "computes something else", capsys, tmp_path / "out")


def test_a_wrong_memory_leaves_nothing(run_folder, tmp_path, capsys, monkeypatch):
    configure = export.hugging_face_config

    def wrong(*arguments):
        config = configure(*arguments)
        config.memory_sampler = "exponential"
        return config

    monkeypatch.setattr(export, "hugging_face_config", wrong)
    refused([str(run_folder)], "computes something else", capsys, tmp_path / "out")


def test_refusals(run_folder, exported, tokenizer, tmp_path, capsys):
    assert export_hf.main([str(run_folder), str(exported)]) == 2
    assert "is there already" in capsys.readouterr().err
    for override in ("model.num_layers=2", "memory.block_length=8", "memory.kind=block_local"):
        refused([str(run_folder), override], "no place in an export", capsys, tmp_path / "out")
    (tmp_path / "text").write_bytes(b"\xff\xfe\xff")
    refused([str(run_folder), "--text", str(tmp_path / "text")], "codec can't decode", capsys, tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert export_hf.main([str(run_folder), str(tmp_path / "link")]) == 2
    assert "is there already" in capsys.readouterr().err
    refused([str(tmp_path / "nothing")], "no complete checkpoint", capsys, tmp_path / "out")
    refused([str(run_folder), "--text", str(tmp_path / "none.txt")], "no text file", capsys, tmp_path / "out")
    run = made_run(tmp_path / "run", tokenizer)
    (run / "tokenizer.model").unlink()
    refused([str(run)], "cannot read the tokenizer", capsys, tmp_path / "out")
    next((run / "checkpoints/step_00000007").glob("*.distcp")).unlink()
    refused([str(run / "checkpoints/step_00000007")], "is missing", capsys, tmp_path / "out")


def test_a_full_disk_leaves_nothing(run_folder, tmp_path, capsys):
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        refused([str(run_folder)], "", capsys, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
