"""An exported folder where nothing of this project is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

USE = """
import importlib.machinery, sys
absent = {"em_megatron", "megatron", "sentencepiece", "omegaconf", "webdataset", "google", "wandb", "accelerate",
          "datasets", "peft", "scipy", "launch", "tokenizer", "lm_eval"}
found = importlib.machinery.PathFinder.find_spec
if "--blocked" in sys.argv:
    importlib.machinery.PathFinder.find_spec = classmethod(
        lambda cls, name, *rest: None if name.split(".")[0] in absent else found(name, *rest))
    sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
text = "abc  def\\n" * 12
inputs = tokenizer(text, return_tensors="pt")
whole = model.generate(**inputs, max_new_tokens=40, do_sample=False)
memory = model.read(inputs.input_ids[:, :-1])
asked = model.generate_from(memory, inputs.input_ids[:, -1:], max_new_tokens=40, do_sample=False)
assert torch.equal(whole[0, -40:], asked[0, -40:])
assert tokenizer.decode(inputs.input_ids[0], skip_special_tokens=True) == text
model.set_memory(order=4, slots=3, sampler="uniform").generate(**inputs, max_new_tokens=5)
print("generated", whole.shape[1] - inputs.input_ids.shape[1], "tokens after", inputs.input_ids.shape[1])
"""


def run(python: Path | str, folder: Path, cache: Path, *options: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "HF_MODULES_CACHE": str(cache / "modules")}
    found = subprocess.run(
        [str(python), "-c", USE, str(folder), *options],
        capture_output=True, text=True, check=False, cwd=cache.parent, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_without_the_packages_of_this_project(exported, tmp_path):
    assert "generated 40 tokens after" in run(sys.executable, exported, tmp_path / "cache", "--blocked")


@pytest.mark.slow
def test_in_a_new_virtual_environment(exported, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    packages = ["torch", "transformers", "safetensors", "tokenizers"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    assert "generated 40 tokens after" in run(python, exported, tmp_path / "cache")
