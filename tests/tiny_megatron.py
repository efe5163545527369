"""A tiny HybridModel and one training step on Megatron-Core's own schedules, for tests of what surrounds them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from em_megatron.model.initialization import initialize_weights
from em_megatron.parallel.process_groups import Layout

VOCABULARY, LENGTH, GLOBAL_BATCH = 32, 12, 4
LAYERS = 2  # Transformer layers, attention and MLP together
PATTERNS = {1: "*-*-", 2: "*-|*-", 4: "*|-|*|-"}  # by pipeline stages × chunks


@dataclass
class Options:
    distributed_optimizer: bool = False
    bf16: bool = False
    dropout: float = 0.0
    tied: bool = False
    sequence_parallel: bool = False
    recompute: bool = False
    width: int = 16
    batch_p2p_comm: bool = False


class Norm(torch.nn.Module):
    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class CausalAttention(SelfAttention):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # [s, b, heads, d] each; SDPA wants [b, heads, s, d]
        q, k, v = (t.permute(1, 2, 0, 3) for t in self.get_query_key_value_tensors(hidden_states)[:3])
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.linear_proj(out.permute(2, 0, 1, 3).flatten(2))


class Stack(HybridStack):
    """HybridStack with our final norm in place of the one it hard-wires."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        if self.post_process:
            self.final_norm = Norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = super().forward(*args, **kwargs)
        return self.final_norm(hidden) if self.post_process else hidden


def stack_spec() -> ModuleSpec:
    def mlp(**kwargs: Any) -> MLP:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        return MLP.as_mlp_submodule(submodules=linears, **kwargs)

    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=IdentityOp, linear_proj=RowParallelLinear
    )
    attention_layer = TransformerLayerSubmodules(
        input_layernorm=Norm,
        self_attention=ModuleSpec(CausalAttention, {"attn_mask_type": AttnMaskType.causal}, attention),
        self_attn_bda=get_bias_dropout_add,
    )
    mlp_layer = TransformerLayerSubmodules(pre_mlp_layernorm=Norm, mlp=mlp, mlp_bda=get_bias_dropout_add)
    layers = HybridStackSubmodules(
        attention_layer=ModuleSpec(TransformerLayer, submodules=attention_layer),
        mlp_layer=ModuleSpec(MLPLayer, submodules=mlp_layer),
    )
    return ModuleSpec(Stack, submodules=layers)


def transformer_config(layout: Layout, options: Options) -> TransformerConfig:
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=2 * LAYERS,
        hidden_size=options.width,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=24,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=options.dropout,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=options.bf16,
        is_hybrid_model=True,
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        virtual_pipeline_model_parallel_size=layout.vpp_size,
        context_parallel_size=layout.cp_size,
        sequence_parallel=options.sequence_parallel,
        batch_p2p_comm=options.batch_p2p_comm,
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True,
        use_cpu_initialization=True,
        perform_initialization=False,
        cuda_graph_impl="none",
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        **(recompute if options.recompute else {}),
    )


@dataclass
class Trainer:
    """Model chunks under DDP, optimizer, scheduler and a step; `step` counts the optimizer steps done."""

    layout: Layout
    options: Options = field(default_factory=Options)
    seed: int = 7
    step: int = 0

    def __post_init__(self) -> None:
        model_parallel_cuda_manual_seed(self.seed, force_reset_rng=True)
        config = transformer_config(self.layout, self.options)
        self.models = [self._model(config, chunk) for chunk in range(self.layout.vpp_size or 1)]
        initialize_weights(self.models, self.seed, std=0.2, num_layers=LAYERS)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            overlap_param_gather=False,
            use_distributed_optimizer=self.options.distributed_optimizer,
        )
        groups = self.layout.pg_collection
        self.chunks = [
            DistributedDataParallel(config, ddp, model, disable_bucketing=i > 0, pg_collection=groups)
            for i, model in enumerate(self.models)
        ]
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1e-2,
                min_lr=1e-3,
                weight_decay=0.1,
                adam_beta1=0.9,
                adam_beta2=0.95,
                clip_grad=1.0,
                bf16=self.options.bf16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=self.options.distributed_optimizer,
            ),
            self.chunks,
            use_gloo_process_groups=False,
            pg_collection=groups,
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, 0.0, 1e-2, 1e-3, 2, 20, "cosine", 0.1, 0.1, 1, "constant"
        )
        config.finalize_model_grads_func = finalize_model_grads
        config.no_sync_func = [c.no_sync for c in self.chunks] if self.layout.vpp_size else self.chunks[0].no_sync
        self.config = config

    def _model(self, config: TransformerConfig, chunk: int) -> HybridModel:
        first = self.layout.pp_rank == 0 and chunk == 0
        last = self.layout.pp_rank == self.layout.pp_size - 1 and chunk == (self.layout.vpp_size or 1) - 1
        return HybridModel(
            config,
            stack_spec(),
            vocab_size=VOCABULARY,
            max_sequence_length=LENGTH,
            hybrid_layer_pattern=PATTERNS[self.layout.pp_size * (self.layout.vpp_size or 1)],
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=self.options.tied,
            position_embedding_type="none",
            pg_collection=self.layout.pg_collection,
            vp_stage=chunk if self.layout.vpp_size else None,
        )

    def microbatches(self) -> Iterator[dict[str, torch.Tensor]]:
        """This data rank's samples of the current step, one at a time, with masks of unequal lengths."""
        generator = torch.Generator().manual_seed(1000 + self.step)
        tokens = torch.randint(VOCABULARY, (GLOBAL_BATCH, LENGTH + 1), generator=generator)
        for sample in range(self.layout.dp_rank, GLOBAL_BATCH, self.layout.dp_size):
            mask = (torch.arange(LENGTH) < LENGTH - 2 * sample).float()
            row = tokens[sample : sample + 1]
            yield {"tokens": row[:, :-1], "labels": row[:, 1:], "mask": mask[None]}

    def train_step(self) -> tuple[float, float]:
        """One optimizer step; returns the mean loss per token over all ranks, and the gradient norm."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        logs = self._forward_backward(forward_only=False)
        success, grad_norm, _ = self.optimizer.step()
        assert success
        self.scheduler.step(increment=1)
        self.step += 1
        return self._mean_loss(logs), float(grad_norm)

    def train(self, steps: int) -> list[tuple[float, float]]:
        return [self.train_step() for _ in range(steps)]

    def _forward_backward(self, forward_only: bool) -> list[dict[str, torch.Tensor]]:
        groups = self.layout.pg_collection
        # The pipelined schedules take a communicator and groups together, or neither.
        p2p = P2PCommunicator(groups.pp, self.config) if self.layout.pp_size > 1 else None
        iterators = [self.microbatches() for _ in self.chunks]
        return get_forward_backward_func(self.layout.pp_size, self.layout.vpp_size)(
            forward_step_func=_forward_step,
            data_iterator=iterators if self.layout.vpp_size else iterators[0],
            model=self.chunks if self.layout.vpp_size else self.chunks[0],
            num_microbatches=GLOBAL_BATCH // self.layout.dp_size,
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=forward_only,
            p2p_communicator=p2p,
            pg_collection=groups,
        )

    def _mean_loss(self, logs: list[dict[str, torch.Tensor]]) -> float:
        groups = self.layout.pg_collection
        total = torch.zeros(2, dtype=torch.float64)
        for log in logs:  # empty before the last pipeline stage
            total += torch.stack([log["loss_sum"], log["num_tokens"]]).double()
        torch.distributed.all_reduce(total, group=groups.dp_cp)
        torch.distributed.all_reduce(total, group=groups.pp)
        return float(total[0] / total[1])


def _forward_step(iterator: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> Any:
    batch = next(iterator)

    def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        loss_sum = (output.float() * batch["mask"]).sum()
        num_tokens = batch["mask"].sum().to(torch.int)
        return loss_sum, num_tokens, {"loss_sum": loss_sum.detach(), "num_tokens": num_tokens}

    return model(batch["tokens"], None, None, labels=batch["labels"]), loss
