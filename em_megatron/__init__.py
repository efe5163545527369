"""Pretraining of language models with Elastic Memory on Megatron-Core."""

import warnings

# Megatron-Core warns once per optional extension that is absent; absence is the normal case without a GPU.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "MimoModelConfig is experimental",
    "full scope is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)
