"""Which modules a layer is made of: the Megatron-Core specs of this model."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from em_megatron.model.elastic_attention import ElasticTransformerConfig, TrapezoidCore
from em_megatron.model.kind_core import KindCore
from em_megatron.model.melodi_layer import MelodiLayer
from em_megatron.model.melodi_stack import MelodiStack
from em_megatron.model.memory_attention import MemoryAttention
from em_megatron.model.norm import RMSNorm


class ElasticStack(HybridStack):
    """Megatron's stack with our final norm: its own is hard-wired to Transformer Engine's."""

    def __init__(self, config: TransformerConfig, submodules: HybridStackSubmodules, **kwargs: Any) -> None:
        super().__init__(config, submodules, **{**kwargs, "post_layer_norm": False})
        if self.post_process:
            self.final_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """[T, b, hidden] → [T, b, hidden], normed on the last stage."""
        hidden = super().forward(*args, **kwargs)
        return self.final_norm(hidden) if self.post_process else hidden


def melodi_stack_spec() -> ModuleSpec:
    """Whole layers `*`: attention, MLP and token mixers in one."""
    return ModuleSpec(
        module=MelodiStack, submodules=HybridStackSubmodules(attention_layer=ModuleSpec(module=MelodiLayer))
    )


def _linear_attention_specs(letters: str) -> dict[str, ModuleSpec]:
    """Of the layers M and G, whose modules are loaded where they are asked for."""
    if not set(letters) & {"M", "G"}:
        return {}
    from em_megatron.model.linear_attention import gated_delta_net_spec, mamba_spec

    return {"mamba_layer": mamba_spec(), "gdn_layer": gated_delta_net_spec()}


def elastic_stack_spec(config: ElasticTransformerConfig, letters: str = "*") -> ModuleSpec:
    """Attention layers `*` with the memory kind and MLP layers `-`, each pre-normed."""
    head_norm = RMSNorm if config.qk_layernorm else None
    attention = ModuleSpec(
        module=MemoryAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=TrapezoidCore if config.memory.kind in ("elastic", "block_local") else KindCore,
            linear_proj=RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    mlp = partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        ffn_hidden_size=config.ffn_hidden_size,
    )
    return ModuleSpec(
        module=ElasticStack,
        submodules=HybridStackSubmodules(
            **_linear_attention_specs(letters),
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=RMSNorm, self_attention=attention, self_attn_bda=get_bias_dropout_add
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(pre_mlp_layernorm=RMSNorm, mlp=mlp, mlp_bda=get_bias_dropout_add),
            ),
        ),
    )
