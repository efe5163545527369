"""Every subcommand at tiny sizes through the entry point: its three files, its ratios and its floors."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from em_megatron.benchmark import machine, options
from em_megatron.benchmark.decode import TARGETS, block_means
from em_megatron.benchmark.decode_transformers import TransformersBackend
from em_megatron.benchmark.models import Exchange, run_config, variants
from em_megatron.benchmark.peers import GrowingCache
from em_megatron.benchmark.picture import binary
from em_megatron.benchmark.runner import default_folder
from em_megatron.hf.config_mapping import hugging_face_config
from em_megatron.model.language_model import build_model
from em_megatron.model.memory_attention import MemoryAttention
from em_megatron.ops.block_layout import BlockLayout
from launch.benchmark import main
from tests.one_rank import one_rank

HEADS = "--kv-heads 2 --head-dim 8 --block 64 --slots 16"
MODEL = "--size tiny --length 128 --block 32 --slots 8 --orders 8,16"
SUBCOMMANDS = {
    "memory": f"--length 256 --orders 8,16 --peer-tokens 2 {HEADS}",
    "attention": f"--lengths 128,256 --heads 4 --order 8 {HEADS}",
    "layer": MODEL,
    "step": f"{MODEL} --vocabulary 64 --batch 2",
    "decode": "--contexts 128,256 --hidden 32 --heads 4 --head-dim 8 --ffn 32 --vocabulary 64 --block 32 --slots 8 "
    "--order 8 --peer-every 8",
    "data": "--length 64 --block 16 --tokens 20000 --shards 4 --group 2 --memory-samples 200",
}
RUNS = SUBCOMMANDS | {"decode --through transformers": SUBCOMMANDS["decode"]}


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    for kind in machine.COPIED_BYTES:
        monkeypatch.setitem(machine.COPIED_BYTES, kind, 2**16)
        monkeypatch.setitem(machine.MATRIX_SIDE, kind, 64)


@pytest.mark.parametrize("run", RUNS)
def test_subcommand(run, tmp_path, capsys):
    arguments = [*run.split(), *RUNS[run].split(), "--rounds", "1", "--bank-cache", "", "--output"]
    assert main([*arguments, str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report/report.json").read_text())
    text = (tmp_path / "report/report.md").read_text()
    assert capsys.readouterr().out.strip() in text  # the picture is only in the file
    assert (tmp_path / "report/report.png").read_bytes().startswith(b"\x89PNG")
    assert {"device", "torch", "triton", "commit", "date"} <= set(report["machine"])
    assert report["command"].startswith(f"python launch/benchmark.py {run} ")
    assert all(rate > 0 for rate in report["ceilings"].values())
    assert report["targets"] == []  # these are not the default shapes
    check_rows(run, report, text)


def check_rows(run: str, report: dict, text: str) -> None:
    measured = [row for row in report["rows"] if row["status"] == "measured"]
    assert measured
    for row in report["rows"]:
        assert row["floor_seconds"] > 0
        assert row["flops"] > 0 or run == "data"  # which only moves bytes
        assert row["bytes"] > 0
        assert row["name"] in text
    for row in measured:
        assert row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
        assert row["times_floor"] > 0
        assert row["times_peer"] is not None
    for row in report["rows"]:
        if row["status"] == "not measured":
            assert f"not measured: {row['reason']}" in text
    if not torch.cuda.is_available():
        silent = [row for row in report["rows"] if row["name"].endswith("triton") and row["status"] == "measured"]
        assert not silent
    assert report["figures"]
    assert any(figure["value"] for figure in report["figures"])


def test_default_shapes_bring_the_targets_and_others_do_not():
    for subcommand in options.SUBCOMMANDS:
        chosen = options.resolve(subcommand, {"rounds": "1", "output": "x"}, "cpu")
        assert options.at_default_shapes(chosen, "cpu")
    assert not options.at_default_shapes(options.resolve("attention", {"slots": "64"}, "cpu"), "cpu")
    assert options.resolve("attention", {}, "cuda").dtype == "bf16"
    assert options.resolve("attention", {"lengths": "512,1024"}, "cpu").lengths == (512, 1024)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["memory", "--lenght", "512"], "--lenght"),
        (["speed"], "invalid choice: 'speed'"),
        ([], "SUBCOMMAND"),
        (["memory", "--orders", "a"], "--orders 'a' is not whole numbers"),
        (["memory", "--rounds", "0"], "--rounds 0 must be at least 1"),
        (["memory", "--dtype", "int8"], "--dtype 'int8' is unknown"),
        (["memory", "--length", "1000"], "--length 1000 is not a whole number of blocks"),
        (["attention", "--heads", "3", "--kv-heads", "2"], "--heads 3 is not a multiple"),
        (["memory", "--device", "tpu"], "--device 'tpu' is unknown"),
        (["decode", "--through", "jax"], "--through 'jax' is unknown: choose one of megatron, transformers"),
        (["step", "--size", "huge"], "model.size 'huge' is unknown"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(arguments, part, capsys):
    assert main(arguments) == 2
    line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(line) == 1
    assert part in line[0]


@pytest.mark.parametrize("subcommand", [[], *[[name] for name in SUBCOMMANDS]])
def test_help_explains(subcommand, capsys):
    with pytest.raises(SystemExit) as done:
        main([*subcommand, "--help"])
    assert done.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert ("peer" in text) if subcommand else all(name in text for name in SUBCOMMANDS)
    if subcommand == ["decode"]:
        defaults = [",".join(map(str, lengths)) for lengths in options.CONTEXTS.values()]
        assert f"(default {'; transformers '.join(defaults)})" in text


def tiny() -> list[str]:
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    rest = ["model.kv_channels=8", "model.ffn_hidden_size=32", "memory.block_length=8", "memory.slots=4"]
    return [*(f"model.{name}={value}" for name, value in shape.items()), *rest]


def test_exchanged_variants_are_models_built_that_way():
    config = run_config(tiny(), 32, "fp32", "", 1)
    found = variants(config, [4, 6])
    tokens = torch.randint(0, 16, (1, 32))
    with one_rank() as groups:
        shared = build_model(config, 16, groups.pg_collection)
        for parameter in shared.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        exchange, outputs = Exchange([shared], found, groups), []
        for name, variant in found.items():
            own = build_model(variant, 16, groups.pg_collection)
            own.load_state_dict(shared.state_dict())
            layout = BlockLayout.single_document(1, 32, variant.memory.block_length)
            exchange.put(name)
            with torch.no_grad():
                wanted, got = (model(tokens, None, None, packed_seq_params=layout) for model in (own, shared))
            torch.testing.assert_close(got, wanted)
            outputs.append(got)
    assert all(not torch.equal(outputs[0], other) for other in outputs[1:])


def test_the_growing_cache_attends_to_all_tokens():
    config = run_config(tiny(), 32, "fp32", "", 1)
    with one_rank() as groups:
        model = build_model(config, 16, groups.pg_collection).eval()
        attention = next(m for m in model.modules() if isinstance(m, MemoryAttention))
        cache = GrowingCache([attention], held=0, capacity=5, like=torch.zeros(()))
    layer = cache.layers[attention.layer_number]
    query, key, value = torch.randn(5, 1, 4, 8), torch.randn(5, 1, 2, 8), torch.randn(5, 1, 2, 8)
    out = torch.cat([layer.attend(query[t : t + 1], key[t : t + 1], value[t : t + 1]) for t in range(5)])
    q, k, v = query[:, 0], key[:, 0].repeat_interleave(2, 1), value[:, 0].repeat_interleave(2, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / 8**0.5
    scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), float("-inf"))
    torch.testing.assert_close(out[:, 0], torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    assert layer.room == 0
    assert cache.num_bytes == 2 * 5 * 2 * 8 * 4


def test_through_transformers_has_contexts_a_folder_and_targets_of_its_own():
    through = {"through": "transformers"}
    chosen = options.resolve("decode", through, "cpu")
    assert chosen.contexts == (4096, 262144)
    assert options.at_default_shapes(chosen, "cpu")
    assert options.resolve("decode", {}, "cpu").contexts == (4096, 65536, 1048576)
    assert options.resolve("decode", through | {"contexts": "512"}, "cpu").contexts == (512,)
    assert default_folder("decode", chosen, "cpu") == "docs/results/benchmark/decode-transformers-cpu"
    assert default_folder("step", options.resolve("step", {}, "cpu"), "cpu") == "docs/results/benchmark/step-cpu"
    limits = {target.key: target.limit for target in TARGETS["cpu"]}
    assert (limits["token/4096/262144"], limits["resident/4096/262144"]) == (1.1, 1.01)


def test_only_decode_through_transformers_needs_transformers(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "em_megatron.benchmark.decode_transformers", raising=False)
    shape = [*SUBCOMMANDS["decode"].split(), "--rounds", "1", "--bank-cache", "", "--output", str(tmp_path)]
    assert main(["decode", *shape]) == 0
    assert main(["decode", "--through", "transformers", *shape]) == 2
    assert "error: --through transformers cannot be measured here: " in capsys.readouterr().err


def test_the_exported_class_and_its_peer_have_the_shape_of_the_run():
    config = run_config([*tiny(), "memory.order=6", "memory.layers=1"], 32, "fp32", "", 1)
    vocabulary = SimpleNamespace(size=100, bos_id=None, eos_id=None, pad_id=None)
    backend = TransformersBackend(config, 128, torch.device("cpu"))
    got, wanted = backend.config.to_dict(), hugging_face_config(config, vocabulary).to_dict()
    aside = {"bos_token_id", "eos_token_id", "pad_token_id", "training_length", "max_position_embeddings"}
    assert {name for name in got | wanted if got.get(name) != wanted.get(name)} <= aside
    assert (got["memory_order"], got["memory_layers"], got["hidden_size"]) == (6, [1], 32)
    counts = [sum(x.numel() for x in model.parameters()) for model in (backend.model, backend.peer_model)]
    assert counts[0] == counts[1]


def test_through_transformers_a_token_sees_what_went_before():
    config = run_config(tiny(), 32, "bf16", "", 1)
    backend = TransformersBackend(config, 128, torch.device("cpu"))
    ours, peer, token = backend.begin(), backend.peer_after(24, 8), torch.zeros(1, 1, dtype=torch.int64)
    for start in range(0, 24, 8):
        logits = ours.feed(torch.arange(start, start + 8)[None])
        assert (logits.shape, logits.dtype) == ((1, 1, 128), torch.bfloat16)
    assert peer.num_bytes == 2 * 2 * 2 * 24 * 8 * 2  # layers, keys and values, heads, tokens, dimension, bytes
    held = ours.num_bytes
    assert not torch.equal(ours.feed(token), backend.begin().feed(token))
    assert not torch.equal(peer.feed(token), backend.peer_after(0, 8).feed(token))
    assert (ours.num_bytes, peer.num_bytes) == (held, 2 * 2 * 2 * 25 * 8 * 2)
    assert ours.cache.get_seq_length() == peer.cache.get_seq_length() == 25


def test_a_token_is_the_mean_of_its_block():
    assert block_means([1.0, 3.0, 2.0, 6.0, 100.0], 2) == [2.0, 4.0]
    assert block_means([1.0, 2.0], 4) == [1.5]


def test_lengths_in_the_picture():
    assert [binary(n) for n in (4096, 2**20, 100)] == ["4k", "1M", "100"]
