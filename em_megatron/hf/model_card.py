"""The README of an exported folder: what it is, how to use it, what was measured, how it was trained."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from em_megatron.config import MemoryConfig
from em_megatron.hf.export import Source
from em_megatron.hf.verification import TOLERANCE, Comparison
from em_megatron.kinds import kind_of
from em_megatron.model.sizes import costs, memory_layers, shape_of
from em_megatron.training.restore import reader_of

_HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags: [TAGS, em-megatron]
---

"""

_USE = """## Use

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100, do_sample=True)[0], skip_special_tokens=True))

# Read a long document once, block by block, and go on from there as often as you like.
memory = model.read(tokenizer(open("document.txt").read(), return_tensors="pt").input_ids)
question = tokenizer("What", return_tensors="pt", add_special_tokens=False).input_ids
print(tokenizer.decode(model.generate_from(memory, question, max_new_tokens=20)[0]))
memory.save("document.safetensors", model)
memory = model.load_memory("document.safetensors")  # another day
{exchange}```

The code in this folder needs torch and transformers (5 or newer). Pad batches on the left; rows of different length are
computed apart. After adding tokens call `model.resize_token_embeddings(len(tokenizer))`: rows without a token are never
generated. Assisted generation and static caches are refused: what was read cannot be taken back.
"""


def model_card(source: Source, compared: Comparison) -> str:
    """Markdown; every figure in it was measured on this checkpoint."""
    model, memory, shape = source.config.model, source.config.memory, shape_of(source.config.model)
    length = source.config.data.sequence_length
    cost = costs(model, memory, source.rows[0].shape[0], length)
    layers = len(memory_layers(memory, shape.num_layers))
    grows = f" at {length:,} tokens" if kind_of(memory).grows else ", whatever its length"
    facts = [
        ("parameters", f"{cost.parameters:,}"),
        ("layers", f"{shape.num_layers} ({layers} with memory)"),
        ("hidden size, heads, key/value heads, head dimension",
         f"{shape.hidden_size}, {shape.num_attention_heads}, {shape.num_query_groups}, {shape.kv_channels}"),
        ("block length", f"{memory.block_length} tokens"),
        ("memory", reader_of(memory)),
        ("memory floats per sequence", f"{cost.memory_floats_per_sequence:,}{grows}"),
        ("parameters of the memory", f"{cost.memory_parameters:,}"),
        ("FLOPs per token of training", f"{cost.flops_per_token / 1e6:,.1f} million"),
        ("vocabulary", f"{source.vocabulary.size:,} (rows of the embedding: {source.rows[0].shape[0]:,})"),
        ("weights", str(source.dtype).removeprefix("torch.")),
    ]  # fmt: skip
    table = "\n".join(f"| {name} | {value} |" for name, value in facts)
    return (
        f"{_HEADER.replace('TAGS', _tags(memory.kind))}# {source.config.name}\n\n"
        f"{_KINDS[memory.kind]} Trained with em-megatron, a reimplementation of arXiv 2602.11212\nfrom its public "
        "description, not the authors' code.\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"{_USE.format(exchange=_exchange(memory))}\n"
        f"## Measured\n\n{_measured(source, compared)}\n\n"
        f"## Training\n\nStep {source.step:,} of {source.config.training.train_steps:,}.{_last_loss(source)} The recipe, as it was:\n\n"
        f"```yaml\n{(source.checkpoint / 'config.yaml').read_text()}```\n"
    )


# One sentence of what a model is.
_KINDS = {
    "elastic": "A language model with Elastic Memory: each block of tokens attends to itself and to a fixed number of "
    "moments read back from a HiPPO-LegS\nsummary of everything before it, so that memory does not grow with the context.",
    "block_local": "A language model whose blocks of tokens attend to themselves alone: it has no memory.",
    "full": "A language model with causal attention over all of the text; what it keeps grows with it.",
    "transformer_xl": "A language model whose blocks of tokens attend to themselves and to the block before "
    "(Transformer-XL, arXiv 1901.02860).",
    "subsample": "A language model whose blocks of tokens attend to themselves and to raw tokens sampled from everything "
    "before; what it keeps\ngrows with the text.",
    "infini": "A language model with Infini-attention (arXiv 2404.07143), written anew: each block of tokens reads a "
    "matrix of associations of\neverything before it.",
    "memorizing": "A Memorizing Transformer (arXiv 2203.08913), written anew: each block of tokens reads the last keys and "
    "values before it.",
    "melodi": "A language model with the memory of Melodi (arXiv 2410.03156), written anew: short-term tokens in every "
    "layer, long-term tokens in one.",
}


def _tags(kind: str) -> str:
    """For who searches a hub."""
    return "elastic-memory, long-context, recurrent-memory" if kind == "elastic" else kind.replace("_", "-")


def _exchange(memory: MemoryConfig) -> str:
    """What of the memory may be changed after training, as code."""
    if memory.kind == "elastic":
        order = max(1, memory.order // 2)
        call = f'order={order}, slots={memory.slots}, sampler="uniform"'
        return f"\n# The memory has no weights: its reader may be exchanged, and its order cut.\nmodel.set_memory({call})\n"
    if memory.kind == "subsample":
        return f'\n# The sampler may be exchanged.\nmodel.set_memory(slots={memory.slots}, sampler="uniform")\n'
    if memory.kind == "memorizing":
        return (
            f"\n# Pairs kept and read may be changed.\nmodel.set_memory(pairs={memory.pairs}, top_k={memory.top_k})\n"
        )
    return ""


def _measured(source: Source, compared: Comparison) -> str:
    lines = [
        f"- This folder against the Megatron model, fp32, {compared.tokens:,} tokens of text: largest difference of a "
        f"logit {compared.logits:.2g}, of memory states {compared.states:.2g} ({TOLERANCE:g} is allowed); of "
        f"{compared.texts:,} texts {compared.other_ids or 'none'} got other token ids. torch {torch.__version__}."
    ]
    found = _evaluation(source)
    if found is None:
        return "\n".join([*lines, "- Held-out text: not measured at this step."])
    lines.append(
        f"- Held-out text, {found['tokens']:,} tokens, {found['bytes']:,} bytes: {found['loss']:.4f} nats per token, "
        f"perplexity {found['perplexity']:.2f}, {found['bits_per_byte']:.4f} bits per byte."
    )
    return "\n".join(lines)


def _evaluation(source: Source) -> dict[str, Any] | None:
    """The run's last evaluation, if it is of this step and this memory."""
    try:
        found: dict[str, Any] = json.loads((source.run_dir / "evaluation" / "evaluation.json").read_text())
    except (OSError, ValueError):
        return None
    same = found.get("step") == source.step and found.get("memory") == dataclasses.asdict(source.config.memory)
    return found if same else None


def _last_loss(source: Source) -> str:
    """The training loss of that step, if the run's metrics are there."""
    try:
        lines = (source.run_dir / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if (row["kind"], row["step"]) == ("train", source.step)]
    except (OSError, ValueError, KeyError):
        return ""
    return f" Its training loss was {rows[-1]['loss']:.4f} nats per token." if rows else ""
