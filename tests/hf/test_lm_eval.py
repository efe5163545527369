"""An exported folder under lm-evaluation-harness: its command line, local tasks, no network, figures checked by hand."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from em_megatron.hf.generation import TransformersText

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[dev]'")

ROLLING = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
GENERATING = """
task: continuation
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "x"
generation_kwargs: {max_gen_toks: 20, until: ["§"], do_sample: false}
metric_list: [{metric: exact_match}]
"""


def results(folder: Path, tmp_path: Path, texts: list[str]) -> tuple[dict, list[dict]]:
    """What lm_eval writes: figures by task, and the samples of the generating one."""
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    for name, task in (("letters", ROLLING), ("continuation", GENERATING)):
        (tmp_path / f"{name}.yaml").write_text(task.replace("DATA", str(data)))
    arguments = ["--model", "hf", "--model_args", f"pretrained={folder},trust_remote_code=True"]
    arguments += ["--tasks", "letters,continuation", "--include_path", str(tmp_path), "--batch_size", "3"]
    arguments += ["--device", "cpu", "--output_path", str(tmp_path / "out"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-m", "lm_eval", *arguments], check=True, env={**os.environ, **offline})
    found = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]
    lines = next((tmp_path / "out").rglob("samples_continuation_*.jsonl")).read_text().splitlines()
    return found, [json.loads(line) for line in lines]


@torch.no_grad()
def test_figures_are_those_of_the_model(exported, tmp_path):
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdef ghijk", k=40 + 90 * index)) for index in range(4)]  # to ten blocks
    found, samples = results(exported, tmp_path, texts)
    text = TransformersText(exported)
    model, tokenizer = text.model, AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    bits = size = 0.0
    for line in texts:
        # The harness puts a bos before the one of the tokenizer, and scores that too, with every tokenizer that has one.
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(line).input_ids]])
        chosen = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        bits, size = bits - float(chosen.sum()) / math.log(2), size + len(line.encode())
    assert found["letters"]["bits_per_byte,none"] == pytest.approx(bits / size, rel=1e-5)
    answers = {sample["doc"]["text"]: sample["resps"][0][0] for sample in samples}
    for line in texts:  # in batches of three, padded on the left
        prompt = tokenizer(line, return_tensors="pt").input_ids
        expected = model.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :]
        assert answers[line] == tokenizer.decode(expected, skip_special_tokens=True)
