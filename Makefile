# Every target makes what it needs, from a fresh clone, and keeps what is already there. `make` lists them.

SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help venv install quickstart test test-slow doctor benchmark lint format clean

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

TEXTS ?=
SEPARATOR ?=
STEPS ?=
RUN ?= $(if $(TEXTS),quickstart-custom,quickstart)
PROMPT = $(if $(TEXTS),The ,Enter the King. )
ARGS ?=

help: ## list the targets
	@echo "usage: make TARGET [VARIABLE=value ...]"
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "variables of quickstart:"
	@echo "  TEXTS=folder   train on the .txt files of a folder of yours instead of Shakespeare and Milton"
	@echo "  SEPARATOR=str  cut each of your files into documents at this string (at least two documents are needed)"
	@echo "  STEPS=n        train for n steps instead of the recipe's"
	@echo "  RUN=name       name of the run: data/name and runs/name (now: $(RUN))"
	@echo "  PROMPT=text    what the sample of generated text begins with (now: $$PROMPT)"
	@echo "other variables:"
	@echo "  PYTHON=path    the Python 3.12 to make $(VENV) with; otherwise one is looked for"
	@echo "  ARGS=...       more arguments for pytest, such as ARGS='-k memory -x'"

# --- environment ---

venv: $(PY) ## make the virtual environment .venv with Python 3.12
	@echo "[venv] $(VENV) is there"

install: $(INSTALLED) ## install em-megatron and its dependencies into .venv, editable
	@echo "[install] $(VENV) is ready"

$(PY):
	@python=$$(sh .ci/find_python.sh "$(PYTHON)") && \
	echo "[venv] making $(VENV) with $$python" && \
	"$$python" -m venv --clear $(VENV)

$(INSTALLED): pyproject.toml | $(PY)
	@$(PY) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
	{ echo "error: the Python in $(VENV) is not 3.12 or does not run: remove the folder $(VENV) and call make again" >&2; exit 1; }
	@echo "[install] installing em-megatron and its dependencies into $(VENV) (torch is large: minutes the first time)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# --- quickstart: seven steps; each is skipped when its output, written last by its command, is there ---

DATA := data/$(RUN)
OUT := runs/$(RUN)
SOURCE := $(if $(TEXTS),$(TEXTS),$(DATA)/books)
export TEXTS SEPARATOR SOURCE PROMPT  # recipes read them from the environment, so that spaces and quotes in them are safe
CUT := $(if $(SEPARATOR),--document-separator "$$SEPARATOR")
TRAINED := $(OUT)/.trained-$(if $(STEPS),$(STEPS),recipe)

# $(call step,number,what it does,its output,command)
define step
	@if [ -e '$(3)' ]; then echo "[quickstart $(1)/7] $(2): $(3) is there"; \
	else echo "[quickstart $(1)/7] $(2) ..."; $(4); fi
endef

# Prints a command's output, and keeps it in a file that is there only when the command has succeeded.
kept = set -o pipefail; $(1) | tee '$(2).partial' && mv '$(2).partial' '$(2)'

quickstart: quickstart-arguments $(INSTALLED) ## texts, tokenizer, shards, training, evaluation, Hugging Face export and a sample
ifeq ($(TEXTS),)
	$(call step,1,fetching the texts,$(SOURCE)/books.json,$(PY) -m tokenizer.books --output $(SOURCE))
else
	@echo "[quickstart 1/7] fetching the texts: yours are used, $$TEXTS"
	@$(remember-texts)
endif
	$(call step,2,training the tokenizer,$(DATA)/tokenizer.model,$(PY) -m tokenizer.train --input "$$SOURCE" $(CUT) \
	--vocab-size 2048 --output $(DATA)/tokenizer.model)
	$(call step,3,encoding the texts,$(DATA)/shards/manifest.json,$(PY) -m tokenizer.encode --input "$$SOURCE" $(CUT) \
	--tokenizer $(DATA)/tokenizer.model --output $(DATA)/shards)
	$(call step,4,training the model,$(TRAINED),$(train) && rm -rf $(OUT)/evaluation.txt $(OUT)/sample.txt $(OUT)/hf && touch $(TRAINED))
	$(call step,5,evaluating it,$(OUT)/evaluation.txt,$(call kept,$(PY) launch/evaluate.py $(OUT) --reference-models,$(OUT)/evaluation.txt))
	@$(if $(filter command,$(firstword $(origin PROMPT))),rm -f $(OUT)/sample.txt,:)
	$(call step,6,exporting it as a Hugging Face folder,$(OUT)/hf/config.json,$(PY) launch/export_hf.py $(OUT) $(OUT)/hf)
	$(call step,7,generating text through transformers,$(OUT)/sample.txt,$(call kept,$(PY) launch/generate.py $(OUT)/hf --prompt "$$PROMPT",$(OUT)/sample.txt))
	@echo "[quickstart] done: look at $(OUT)/loss.png, $(OUT)/throughput.png, $(OUT)/positions.png, $(OUT)/evaluation.txt, $(OUT)/hf/README.md and $(OUT)/sample.txt"

.PHONY: quickstart-arguments
quickstart-arguments:
	@case '$(STEPS)' in *[!0-9]*|0) echo "error: STEPS=$(STEPS) is not a number of steps: give one of at least 1" >&2; exit 1;; esac
	@case '$(RUN)' in ''|*[!A-Za-z0-9._-]*) echo "error: RUN=$(RUN) cannot name a folder: use letters, digits, dot, dash" >&2; exit 1;; esac
	@[ -z "$$TEXTS" ] || [ -d "$$TEXTS" ] || { echo "error: TEXTS=$$TEXTS is not a folder: give one that holds .txt files" >&2; exit 1; }

# A tokenizer and shards belong to their texts: the same RUN with other texts is refused.
define remember-texts
mkdir -p $(DATA) && \
sum=$$(cd "$$TEXTS" && { find -L . -type f -name '*.txt' -exec cksum {} + | sort; echo "$$SEPARATOR"; } | cksum) && \
if [ -e $(DATA)/tokenizer.model ] && [ "$$(cat $(DATA)/texts.cksum)" != "$$sum" ]; then \
	echo "error: $(DATA) was made from other texts or another SEPARATOR than this call's: give another RUN=name, or remove $(DATA) and $(OUT)" >&2; \
	exit 1; \
fi; echo "$$sum" > $(DATA)/texts.cksum
endef

# Two processes on the CPU, else 1, 2, 4 or 8 GPUs: pairs share the model, and each pair takes a sample of a step.
define train
gpus=$$($(PY) -c 'import torch; print(torch.cuda.device_count())') && case $$gpus in \
	1) ranks=1 tensor=1;; 0|2|3) ranks=2 tensor=2;; 4|5|6|7) ranks=4 tensor=2;; *) ranks=8 tensor=2;; esac && \
OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --standalone --nproc-per-node=$$ranks launch/pretrain.py launch/recipes/quickstart.yaml \
	name=$(RUN) data.path=$(DATA)/shards \
	parallel.tensor_model_parallel_size=$$tensor training.global_batch_size=$$((ranks / tensor)) \
	$(if $(STEPS),training.train_steps=$(STEPS) optimizer.warmup_steps=$$(($(STEPS) / 10)))
endef

# --- checks ---

test: $(INSTALLED) ## run the tests that need no GPU and take less than a minute each
	@echo "[test] the tests, without slow and gpu ones"
	@$(PY) -m pytest -m "not slow and not gpu" $(ARGS)

test-slow: $(INSTALLED) ## run the tests that take longer than a minute
	@echo "[test-slow] the slow tests"
	@$(PY) -m pytest -m "slow and not gpu" $(ARGS)

doctor: $(INSTALLED) ## say whether this environment is fit to train, and which path everything takes
	@$(PY) launch/doctor.py

benchmark: $(INSTALLED) ## measure speed against what one would pick instead; reports go to docs/results/benchmark
	@for kind in memory attention layer step decode data; do echo "[benchmark] $$kind"; $(PY) launch/benchmark.py $$kind || exit 1; done

lint: $(INSTALLED) ## check style, format and types; shell scripts too where shellcheck is there
	@echo "[lint] ruff check, ruff format --check, mypy, shellcheck"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy em_megatron
	@if command -v shellcheck >/dev/null; then shellcheck .ci/run slurm/*.sh; \
	else echo "[lint] shellcheck is not there, so the shell scripts were not checked"; fi

format: $(INSTALLED) ## rewrite the code in the project's format
	@echo "[format] ruff check --fix, ruff format"
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean: ## remove caches and build products; .venv, data and runs stay
	@echo "[clean] removing caches and build products"
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
