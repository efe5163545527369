"""Linear-attention layers of Megatron-Core in the same stack: Mamba-2 (`M`) and Gated DeltaNet (`G`).

Their modules are Megatron's own, whose kernels come with the packages mamba_ssm and flash-linear-attention; here they go
through every document by itself, so that packed samples do not leak, and get initial weights that do not depend on the
layout. On the CPU Gated DeltaNet computes in plain torch; Mamba-2 needs a GPU.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from em_megatron.model.norm import RMSNorm
from em_megatron.ops.block_layout import BlockLayout

PACKAGES = {"M": ("mamba_ssm", "mamba-ssm"), "G": ("fla", "flash-linear-attention")}


def missing_package(letter: str) -> str | None:
    """The package that layers of this letter need and that is not installed, as pip names it."""
    module, package = PACKAGES[letter]
    return package if importlib.util.find_spec(module) is None else None


def documents(layout: BlockLayout) -> list[list[tuple[int, int]]]:
    """First and last token (exclusive) of every document, and of padding between them, by sample."""
    found: list[list[tuple[int, int]]] | None = layout.derived.get(documents)
    if found is None:
        found = []
        for ids in layout.segment_ids.tolist():
            starts = [at for at, segment in enumerate(ids) if not at or segment != ids[at - 1]]
            found.append(list(zip(starts, [*starts[1:], len(ids)], strict=True)))
        layout.derived[documents] = found
    return found


def each_document(function: Callable[[Tensor], Tensor], hidden: Tensor, layout: BlockLayout) -> Tensor:
    """function([n, 1, D]) of every document of hidden [T, b, D], put together again."""
    rows = [
        torch.cat([function(hidden[start:stop, row : row + 1]) for start, stop in parts])
        for row, parts in enumerate(documents(layout))
    ]
    return torch.cat(rows, 1)


class DocumentGatedDeltaNet(GatedDeltaNet):
    """Megatron's Gated DeltaNet (arXiv 2412.06464), one document after another."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, packed_seq_params: Any = None, **_: Any
    ) -> tuple[Tensor, None]:
        """[T, b, D] → ([T, b, D], no bias)."""

        def one(x: Tensor) -> Tensor:
            out: Tensor = GatedDeltaNet.forward(self, x, None)[0]
            return out

        return each_document(one, hidden_states, packed_seq_params), None

    def _prepare_input_for_gated_delta_rule(
        self, qkv: Tensor, gate: Tensor, batch: int, seq_len: int, *features: Tensor
    ) -> tuple[Tensor, ...]:
        """Queries and keys of length one, and values, by heads; as Megatron's own, which asks for a Triton kernel."""
        if qkv.is_cuda:
            found: tuple[Tensor, ...] = super()._prepare_input_for_gated_delta_rule(
                qkv, gate, batch, seq_len, *features
            )
            return found
        heads = qkv.unflatten(-1, (3, self.num_key_heads, self.key_head_dim))
        query, key = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in heads.unbind(2)[:2])
        return query, key, heads[:, :, 2], gate, *features

    def _compute_g_and_beta(
        self, A_log_local_cp: Tensor, dt_bias_local_cp: Tensor, alpha: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """log of the decay, −A softplus(α + dt_bias), and the step σ(β); not compiled on the CPU."""
        if alpha.is_cuda:
            found: tuple[Tensor, Tensor] = super()._compute_g_and_beta(A_log_local_cp, dt_bias_local_cp, alpha, beta)
            return found
        return -A_log_local_cp.exp() * F.softplus(alpha.float() + dt_bias_local_cp), beta.sigmoid()


class DocumentMambaLayer(MambaLayer):
    """Megatron's Mamba-2 layer (arXiv 2405.21060), one document after another."""

    def forward(self, hidden_states: Tensor, *args: Any, packed_seq_params: Any = None, **_: Any) -> Tensor:
        """[T, b, D] → the same."""

        def one(x: Tensor) -> Tensor:
            out: Tensor = MambaLayer.forward(self, x)
            return out

        return each_document(one, hidden_states, packed_seq_params)


def gated_delta_net_spec() -> ModuleSpec:
    """A pre-normed layer `G`."""
    mixer = ModuleSpec(
        module=DocumentGatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(in_proj=ColumnParallelLinear, out_norm=RMSNorm, out_proj=RowParallelLinear),
    )
    submodules = TransformerLayerSubmodules(
        input_layernorm=RMSNorm, self_attention=mixer, self_attn_bda=get_bias_dropout_add
    )
    return ModuleSpec(module=TransformerLayer, submodules=submodules)


def mamba_spec() -> ModuleSpec:
    """A pre-normed layer `M`."""
    mixer = ModuleSpec(
        module=MambaMixer, submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    )
    submodules = MambaLayerSubmodules(norm=RMSNorm, mixer=mixer, mamba_bda=get_bias_dropout_add)
    return ModuleSpec(module=DocumentMambaLayer, submodules=submodules)


@torch.no_grad()
def initialize_recurrences(chunk: torch.nn.Module, seed: int) -> None:
    """Decay rates and step sizes as their papers begin, from a seed of the layer: A in [1, 16], softplus(dt_bias) in
    [0.001, 0.1] for Mamba-2, dt_bias 1 for Gated DeltaNet."""
    for module in chunk.modules():
        if not isinstance(module, GatedDeltaNet | MambaMixer):
            continue
        digest = hashlib.sha256(f"{seed}:recurrence:{module.layer_number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        rates = 1 + 15 * torch.rand(module.A_log.shape, generator=generator)
        module.A_log.copy_(rates.log())
        if isinstance(module, GatedDeltaNet):
            module.dt_bias.fill_(1.0)
            continue
        steps = torch.exp(torch.rand(module.dt_bias.shape, generator=generator) * 4.6052 - 6.9078)
        module.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))
        module.D.fill_(1.0)
        module.conv1d_bias.zero_()
