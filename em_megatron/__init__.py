"""Pretraining of language models with Elastic Memory on Megatron-Core."""

import logging
import warnings

# Megatron-Core warns once per optional extension that is absent; absence is the normal case without a GPU. torch warns
# that one rank alone loads a checkpoint, and that a CUDA toolkit has no device: both are said where they matter.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
for _message in (
    "torch.distributed is disabled, unavailable or uninitialized",
    "The argument order of load has been changed",
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "MimoModelConfig is experimental",
    "full scope is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)
