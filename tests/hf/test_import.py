"""The way back: byte for byte from our own folders, and from Llama-style models as a starting point."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from em_megatron.checkpoint.contents import stored_tensors
from em_megatron.config import load_config
from em_megatron.hf.export import read_weights
from em_megatron.hf.importing import import_folder, read_folder, run_config
from em_megatron.ops.block_layout import BlockLayout
from em_megatron.parallel.process_groups import shutdown
from em_megatron.training.restore import restore
from launch import export_hf, import_hf
from tests.hf.made_runs import VARIANTS, made_run, write_from_layout

LLAMA = {
    "vocab_size": 640,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
SMALL = ["memory.block_length=16", "memory.order=8", "memory.slots=4"]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = next((run / "checkpoints").glob("step_*"))
    return read_weights(checkpoint, list(stored_tensors(checkpoint)))


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert weight.dtype == second[name].dtype
        assert torch.equal(weight, second[name]), name


@pytest.mark.parametrize(
    "variant", ["tied", "qk-norm, exponential", "bf16", "infini, linear", "memorizing, top-k", "melodi"]
)
def test_there_and_back_byte_for_byte(variant, tokenizer, tmp_path):
    run = made_run(tmp_path / "run", tokenizer, *VARIANTS[variant])
    assert export_hf.main([str(run), str(tmp_path / "there"), "--max-shard-size", "60K"]) == 0
    assert import_hf.main([str(tmp_path / "there"), str(tmp_path / "back")]) == 0
    assert_same(weights_of(run), weights_of(tmp_path / "back"))
    assert (run / "tokenizer.model").read_bytes() == (tmp_path / "back/tokenizer.model").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "there", "back"}


def test_there_and_back_again_and_without_a_recipe(run_folder, exported, folder, tmp_path):
    assert import_hf.main([str(exported), str(tmp_path / "back")]) == 0
    assert export_hf.main([str(tmp_path / "back"), str(tmp_path / "again")]) == 0
    first, second = (json.loads((path / "config.json").read_text()) for path in (exported, tmp_path / "again"))
    assert first == second
    (folder / "training_recipe.yaml").unlink()  # the configuration alone says enough
    assert import_hf.main([str(folder), str(tmp_path / "alone")]) == 0
    assert_same(weights_of(run_folder), weights_of(tmp_path / "alone"))


def import_on_rank(folder: Path, out: Path) -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    found = read_folder(folder)
    config = run_config(found, out, ["parallel.tensor_model_parallel_size=2"])
    import_folder(found, config, out, 2, lambda _: None)


def test_on_two_tensor_ranks(ranks, run_folder, exported, tmp_path):
    ranks(2).run(import_on_rank, exported, tmp_path / "back")
    assert_same(weights_of(run_folder), weights_of(tmp_path / "back"))


@pytest.mark.parametrize("variant", ["memorizing, top-k", "melodi"])
def test_weights_of_a_memory_from_and_on_two_tensor_ranks(variant, ranks, tokenizer, tmp_path):
    overrides = ["parallel.tensor_model_parallel_size=2", *VARIANTS[variant]]
    ranks(2).run(write_from_layout, tmp_path / "run", tokenizer, overrides)
    assert export_hf.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    ranks(2).run(import_on_rank, tmp_path / "out", tmp_path / "back")
    assert_same(weights_of(tmp_path / "run"), weights_of(tmp_path / "back"))


@torch.no_grad()
def megatron_logits(run: Path, ids: torch.Tensor, rows: int) -> torch.Tensor:
    """Logits of one block after the restored weights; `rows` where there is no tokenizer to ask."""
    found = restore(run, [], 1)
    try:
        layout = BlockLayout.from_segment_ids(torch.ones_like(ids), 16, ids.device)
        return found.model[0](ids, None, None, packed_seq_params=layout, runtime_gather_output=True)
    finally:
        shutdown()


@pytest.mark.parametrize(
    ("kind", "config"),
    [(LlamaForCausalLM, LlamaConfig(**LLAMA)), (Qwen3ForCausalLM, Qwen3Config(**LLAMA, tie_word_embeddings=True))],
)
def test_a_llama_style_model_is_the_same_within_a_block(kind, config, tokenizer, tmp_path, capsys):
    torch.manual_seed(0)
    model = kind(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(tmp_path / "llama")
    assert import_hf.main([str(tmp_path / "llama"), str(tmp_path / "run"), *SMALL]) == 0
    saved = load_config(tmp_path / "run/config.yaml")
    assert (saved.memory.order, saved.model.qk_layernorm) == (8, kind is Qwen3ForCausalLM)
    shutil.copyfile(tokenizer, tmp_path / "run/tokenizer.model")  # 640 ids too
    ids = torch.randint(3, 640, (1, 16))
    expected = model(ids).logits
    torch.testing.assert_close(megatron_logits(tmp_path / "run", ids, 640), expected, rtol=0, atol=2e-5)
    # And out again, as an Elastic Memory model.
    assert export_hf.main([str(tmp_path / "run"), str(tmp_path / "elastic")]) == 0
    theirs, ours = load_file(tmp_path / "llama/model.safetensors"), load_file(tmp_path / "elastic/model.safetensors")
    assert_same({name: theirs[name] for name in sorted(theirs)}, {name: ours[name] for name in sorted(ours)})


def llama_folder(path: Path, dtype: torch.dtype = torch.float32, **changes: object) -> dict[str, torch.Tensor]:
    """A Llama of random weights in this dtype; its tensors by name."""
    LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes})).to(dtype).save_pretrained(path)
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize(
    ("dtype", "overrides", "wanted"),
    [
        (torch.float16, [], torch.float32),
        (torch.bfloat16, [], torch.bfloat16),
        (torch.float32, ["training.precision=bf16"], torch.bfloat16),
    ],
)
def test_dtypes(dtype, overrides, wanted, tmp_path):
    weights = llama_folder(tmp_path / "llama", dtype)
    edit(tmp_path / "llama", architectures=["MistralForCausalLM"], sliding_window=None)
    assert import_hf.main([str(tmp_path / "llama"), str(tmp_path / "run"), *SMALL, *overrides]) == 0
    found = weights_of(tmp_path / "run")
    assert {weight.dtype for weight in found.values()} == {wanted}
    assert torch.equal(
        found["decoder.layers.3.mlp.linear_fc2.weight"], weights["model.layers.1.mlp.down_proj.weight"].to(wanted)
    )
    config = load_config(tmp_path / "run/config.yaml")
    assert config.training.precision == ("bf16" if wanted == torch.bfloat16 else "fp32")
    assert (config.name, config.run_dir) == ("run", tmp_path / "run")


def test_tied_embeddings_that_are_stored_twice(tmp_path, capsys):
    weights = llama_folder(tmp_path / "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in weights
    for factor, code in ((1, 0), (2, 2)):
        twice = {**weights, "lm_head.weight": factor * weights["model.embed_tokens.weight"]}
        save_file(twice, tmp_path / "llama/model.safetensors")
        assert import_hf.main([str(tmp_path / "llama"), str(tmp_path / f"run{factor}"), *SMALL]) == code
    assert "stores an lm_head.weight of other numbers" in capsys.readouterr().err


def test_quantised_weights_are_refused(tmp_path, capsys):
    weights = llama_folder(tmp_path / "llama")
    save_file(
        {name: weight.to(torch.float8_e4m3fn) for name, weight in weights.items()}, tmp_path / "llama/model.safetensors"
    )
    assert import_hf.main([str(tmp_path / "llama"), str(tmp_path / "run"), *SMALL]) == 2
    assert "stores weights as F8_E4M3: give fp32, fp16 or bf16" in capsys.readouterr().err


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "folder"))


def edit(folder: Path, **changes: object) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def without_shard(folder: Path) -> None:
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def without_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")


def with_other_tokenizer(folder: Path) -> None:
    rows = {name: weight[:512] if "embed" in name or "lm_head" in name else weight
            for name, weight in load_file(folder / "model.safetensors").items()}  # fmt: skip
    save_file({name: weight.contiguous() for name, weight in rows.items()}, folder / "model.safetensors")
    edit(folder, vocab_size=512)


BROKEN = {
    "a shard is missing": (without_shard, "model-00001-of-00001.safetensors is missing"),
    "a truncated file": (cut, "is damaged"),
    "a weight is missing": (without_weight, "1 tensors are missing, such as model.layers.1.mlp.up_proj.weight"),
    "more layers than weights": (lambda f: edit(f, num_hidden_layers=6, memory_layers=[0]), "are missing"),
    "another width": (lambda f: edit(f, intermediate_size=64), "instead of"),
    "heads that cannot be": (lambda f: edit(f, num_key_value_heads=3), "multiple of num_key_value_heads"),
    "another vocabulary": (with_other_tokenizer, "does not fit the 512 rows"),
    "an unknown architecture": (lambda f: edit(f, architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel, which is unknown"),
    "no architecture": (lambda f: edit(f, architectures=None), "architecture none"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "an index of something else": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": ["model.safetensors"]}'),
        "its weight_map must name a file",
    ),
    "an index that leads elsewhere": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}'),
        "its weight_map must name a file",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "copy tokenizer.model from the folder that was exported"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_folders(broken, folder, tmp_path, capsys):
    breaks, words = BROKEN[broken]
    breaks(folder)
    assert import_hf.main([str(folder), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"folder"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "rotary embedding of type 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "rotary embedding of type 'linear'"),
        ({"sliding_window": 4096}, "sliding window of 4096"),
        ({"hidden_size": None}, "lacks or garbles a field"),
    ],
)  # fmt: skip
def test_llama_style_models_with_what_this_one_has_not(changes, words, tmp_path, capsys):
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "llama")
    edit(tmp_path / "llama", **changes)
    assert import_hf.main([str(tmp_path / "llama"), str(tmp_path / "run")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_kind_with_weights_needs_them(tmp_path, capsys):
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "llama")
    for kind in ("infini", "memorizing", "melodi"):
        arguments = [str(tmp_path / "llama"), str(tmp_path / "run"), f"memory.kind={kind}"]
        assert import_hf.main(arguments) == 2
        error = capsys.readouterr().err
        assert f"has no weights for memory.kind '{kind}'" in error
        assert len(error.strip().splitlines()) == 1
        assert not (tmp_path / "run").exists()
    for kind in ("full", "subsample"):
        assert import_hf.main([str(tmp_path / "llama"), str(tmp_path / kind), f"memory.kind={kind}", *SMALL]) == 0


def test_weights_of_a_memory_stay_with_it(tokenizer, exported, tmp_path, capsys):
    run = made_run(tmp_path / "run", tokenizer, *VARIANTS["infini, linear"])
    assert export_hf.main([str(run), str(tmp_path / "there")]) == 0
    for folder, kind in ((tmp_path / "there", "full"), (tmp_path / "there", "memorizing"), (exported, "melodi")):
        assert import_hf.main([str(folder), str(tmp_path / "back"), f"memory.kind={kind}"]) == 2
        error = capsys.readouterr().err
        assert "are imported as they were exported" in error
        assert len(error.strip().splitlines()) == 1
    assert import_hf.main([str(exported), str(tmp_path / "other"), "memory.kind=full"]) == 0


@pytest.mark.parametrize(("kind", "layers"), [("elastic", []), ("block_local", [0, 1, 2, 3])])
def test_no_memory_under_either_name(kind, layers, folder, tmp_path):
    edit(folder, memory_kind=kind, memory_layers=layers)
    (folder / "training_recipe.yaml").unlink()
    assert import_hf.main([str(folder), str(tmp_path / "run")]) == 0
    memory = load_config(tmp_path / "run/config.yaml").memory
    assert (memory.kind, memory.layers) == ("block_local", "all")


def test_refusals(exported, tmp_path, capsys):
    for arguments, words in (
        ([str(exported), str(tmp_path)], "is there already"),
        ([str(exported), str(tmp_path / "run"), "model.num_layers=2"], "no place in an import"),
        ([str(exported), str(tmp_path / "run"), "memory.ordr=2"], "unknown config key"),
        ([str(tmp_path / "nothing"), str(tmp_path / "run")], "config.json is missing"),
    ):
        assert import_hf.main(arguments) == 2
        assert words in capsys.readouterr().err
