"""Bytes that the forward pass keeps for the backward pass on one rank, and what the backward pass needs beside them.

Per micro-batch, with R tokens on the rank, hidden h, query width q = heads·d, key width k = kv_heads·d, MLP width f and
vocabulary V, all of this rank, and R' = R / tensor ranks under sequence parallelism (else R), a layer keeps

    residual stream before attention and before the MLP         2 R' h
    both norms: output, and one fp32 number a row               2 R' (h, +4 bytes)
    linear_qkv's output, of which keys and values are views     R (q + 2k)
    queries, where several heads share a key (a copy)           R q
    slots of the memory, S for each block of L tokens           2 k R S / L
    attention's output, and the fp32 log-sum-exp of a row       R (q, +4 bytes per head)
    linear_fc1's output, SwiGLU's output                        3 R f

as the autograd functions of em_megatron/ops, RMSNorm, Megatron's parallel linear layers and its fused SwiGLU save
them; the memory operator is linear and keeps nothing. Selective recomputation drops slots and log-sum-exp, full
recomputation all but the first residual. The last stage adds the softmax over the vocabulary in fp32. Where there is
dropout, each half of a layer and the embedding keep its mask, a byte for each number (not measured).
tests/planning/test_activations.py compares all of it with what built models allocate.
"""

from __future__ import annotations

from dataclasses import dataclass

from em_megatron.planning.job import Job

STATISTIC_BYTES = 4  # fp32 number per row of a norm or of attention
INPUT_BYTES = 41  # ids, labels, positions, loss mask and document bounds of a token
TARGET_BYTES = 9  # a label's place in the local vocabulary, and whether it lies there
GATHERED_IDS_BYTES = 9  # the same of the embedding's ids


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch on a rank.

    residual: one copy of the residual stream. attention: kept by the attention half of a layer, core apart. core: slots
    and statistics of the core attention, in a layer with memory (core_alone: without). mlp: kept by the MLP half.
    embedding: kept by the first stage's embedding. head: kept by the last stage's norm and loss.
    """

    residual: int
    attention: int
    core: int
    core_alone: int
    mlp: int
    embedding: int
    head: int

    @classmethod
    def of(cls, job: Job) -> Activations:
        shape, item, rows, rows_split = job.shape, job.itemsize, job.tokens, job.tokens // job.sequence_split
        query, key = job.heads * shape.kv_channels, job.kv_heads * shape.kv_channels
        residual = rows_split * shape.hidden_size * item
        normed = residual + rows_split * STATISTIC_BYTES
        dropout = rows_split * shape.hidden_size if job.config.model.hidden_dropout else 0  # a mask of one byte
        heads = rows * _heads_width(job) * item + (rows * _head_norms(job) * STATISTIC_BYTES)
        statistics = rows * job.heads * STATISTIC_BYTES
        slots = 2 * key * rows // job.config.memory.block_length * job.config.memory.slots * item
        logits = job.vocab // job.tensor
        return cls(
            residual=residual,
            attention=residual + normed + heads + rows * query * item + dropout,
            core=slots + statistics,
            core_alone=statistics,
            mlp=residual + normed + 3 * rows * shape.ffn_hidden_size // job.tensor * item + dropout,
            embedding=rows * (GATHERED_IDS_BYTES if job.tensor > 1 else 0) + dropout,
            head=normed + rows * (logits * 4 + TARGET_BYTES),
        )

    def layers(self, recompute: str, layers: int, with_memory: int) -> int:
        """Kept by so many layers, of which some have a memory."""
        if recompute == "full":
            return layers * self.residual
        kept = layers * (self.attention + self.mlp)
        return kept if recompute == "selective" else kept + self._cores(layers, with_memory)

    def _cores(self, layers: int, with_memory: int) -> int:
        return with_memory * self.core + (layers - with_memory) * self.core_alone

    def recomputed(self, recompute: str, with_memory: bool) -> int:
        """Made again by the backward pass of one layer before it uses it."""
        core = self._cores(1, int(with_memory))
        return {"none": 0, "selective": core, "full": self.attention + self.mlp + core - self.residual}[recompute]


def _heads_width(job: Job) -> int:
    """Numbers that a token keeps of its queries, keys and values."""
    query, key = job.heads * job.shape.kv_channels, job.kv_heads * job.shape.kv_channels
    width = query + 2 * key
    if job.heads > job.kv_heads > 1:
        width += query
    return width + (query + key if job.config.model.qk_layernorm else 0)


def _head_norms(job: Job) -> int:
    return job.heads + job.kv_heads if job.config.model.qk_layernorm else 0


def loss_peak(job: Job, kept: Activations) -> int:
    """Beside everything kept, at the loss of the last stage: the logits, or their gradient, in the compute dtype.

    In bf16 the loss makes an fp32 copy, which is kept as the softmax; in fp32 it works in place, and the largest moment
    is the output layer's backward pass.
    """
    logits = job.tokens * (job.vocab // job.tensor)
    if job.itemsize == 2:
        return logits * job.itemsize
    weight = job.vocab // job.tensor * job.shape.hidden_size
    return (weight + job.tokens * job.shape.hidden_size) * job.itemsize + kept.residual


def layer_peak(job: Job, kept: Activations, with_memory: bool) -> int:
    """Beside everything kept, loss included or not, in the backward pass of a layer of the stage.

    The larger of two moments of the MLP: the gradients of SwiGLU's input and output while its input is still there,
    its output being gone; and those of linear_fc2, with the gathered gradient under sequence parallelism.
    """
    rows, item, hidden = job.tokens, job.itemsize, job.shape.hidden_size
    ffn = job.shape.ffn_hidden_size // job.tensor
    activation = 2 * rows * ffn
    gathered = rows * hidden if job.sequence_split > 1 else 0
    linear = rows * ffn + ffn * hidden + gathered
    again = kept.recomputed(job.config.training.recompute, with_memory)
    mlp = max(activation, linear) * item + kept.residual
    if job.config.training.recompute == "full":
        return again + kept.residual + mlp
    return max(mlp, again + kept.residual)
