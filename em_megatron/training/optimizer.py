"""Megatron-Core's optimizer and learning-rate schedule, from the recipe."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from em_megatron.config import RunConfig
from em_megatron.model.language_model import PRECISIONS
from em_megatron.parallel import fused_adamw
from em_megatron.validate import decay_steps


def build_optimizer(config: RunConfig, model_chunks: list[torch.nn.Module], groups: ProcessGroupCollection) -> Any:
    """AdamW over DDP-wrapped chunks, its state sharded over data-parallel ranks on request."""
    fused_adamw.install()  # where neither Transformer Engine nor apex brings one
    options = config.optimizer
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.beta1,
        adam_beta2=options.beta2,
        adam_eps=options.epsilon,
        clip_grad=options.clip_grad,
        bf16=config.training.precision == "bf16",
        params_dtype=PRECISIONS[config.training.precision],
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
    )
    return get_megatron_optimizer(megatron_config, model_chunks, use_gloo_process_groups=False, pg_collection=groups)


def build_scheduler(config: RunConfig, optimizer: Any) -> OptimizerParamScheduler:
    """Warm-up, then cosine, wsd or constant; counted in steps."""
    options, steps = config.optimizer, config.training.train_steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=options.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style={"wsd": "WSD"}.get(options.schedule, options.schedule),
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=decay_steps(config) if options.schedule == "wsd" else None,
        lr_wsd_decay_style="cosine" if options.schedule == "wsd" else None,
    )
