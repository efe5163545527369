"""A run on so many GPUs: the sizes that every part of a plan is made from, with Megatron's names for the axes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from em_megatron.config import RunConfig
from em_megatron.hippo.cost_model import plan
from em_megatron.model.sizes import Shape, memory_layers, padded_vocab_size, shape_of
from em_megatron.parallel.handoff_cost import choose_handoff, state_bytes
from em_megatron.planning.gpus import GPU


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs; NVLink inside a node, a network between them."""

    gpu: GPU
    nodes: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Job:
    """A recipe with its layout on a world of ranks.

    config: a validated run. world_size: ranks, one per GPU. vocab_size: ids of the tokenizer, not padded.
    """

    config: RunConfig
    world_size: int
    vocab_size: int

    @cached_property
    def shape(self) -> Shape:
        return shape_of(self.config.model)

    @cached_property
    def vocab(self) -> int:
        """The padded vocabulary, V."""
        return padded_vocab_size(self.vocab_size, self.config.model.make_vocab_size_divisible_by)

    @cached_property
    def tensor(self) -> int:
        return self.config.parallel.tensor_model_parallel_size

    @cached_property
    def pipeline(self) -> int:
        return self.config.parallel.pipeline_model_parallel_size

    @cached_property
    def chunks(self) -> int:
        return self.config.parallel.virtual_pipeline_model_parallel_size

    @cached_property
    def context(self) -> int:
        return self.config.parallel.context_parallel_size

    @cached_property
    def data(self) -> int:
        return self.world_size // (self.tensor * self.pipeline * self.context)

    @cached_property
    def replicas(self) -> int:
        """Ranks that hold the same weights: data × context parallel, over which gradients are summed."""
        return self.data * self.context

    @cached_property
    def sequence_split(self) -> int:
        """Ranks that share norms and residual stream of a micro-batch: the tensor ranks under sequence parallelism."""
        return self.tensor if self.config.parallel.sequence_parallel else 1

    @cached_property
    def micro_batches(self) -> int:
        """Forward passes of a rank in a step."""
        return self.config.training.global_batch_size // (self.config.training.micro_batch_size * self.data)

    @cached_property
    def tokens(self) -> int:
        """Tokens of a micro-batch on a rank: b · T / context_parallel_size."""
        return self.config.training.micro_batch_size * self.config.data.sequence_length // self.context

    @cached_property
    def tokens_per_step(self) -> int:
        return self.config.training.global_batch_size * self.config.data.sequence_length

    @cached_property
    def itemsize(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.config.training.precision == "bf16" else 4

    @cached_property
    def heads(self) -> int:
        """Query heads on a rank."""
        return self.shape.num_attention_heads // self.tensor

    @cached_property
    def kv_heads(self) -> int:
        return self.shape.num_query_groups // self.tensor

    @cached_property
    def layers_per_chunk(self) -> int:
        return self.shape.num_layers // (self.pipeline * self.chunks)

    @cached_property
    def memory_layers(self) -> tuple[int, ...]:
        """Layers that have a memory, counted from 0."""
        return memory_layers(self.config.memory, self.shape.num_layers)

    def memory_layers_of(self, stage: int) -> list[int]:
        """Memory layers in each model chunk of a pipeline stage."""
        size = self.layers_per_chunk
        starts = [(chunk * self.pipeline + stage) * size for chunk in range(self.chunks)]
        return [sum(start <= layer < start + size for layer in self.memory_layers) for start in starts]

    @cached_property
    def blocks(self) -> int:
        """Blocks of a sample on a rank."""
        return self.config.data.sequence_length // self.config.memory.block_length // self.context

    @cached_property
    def passes_states(self) -> bool:
        """Whether documents enter or leave the blocks of a rank, from other ranks or other steps."""
        return self.context > 1 or self.config.memory.carry_memory

    @cached_property
    def superchunk(self) -> int:
        """Blocks that the memory computes at once."""
        memory = self.config.memory
        sizes = (memory.order, memory.slots, memory.block_length)
        return memory.superchunk or plan(self.blocks, *sizes, part_of_sample=self.passes_states)

    @cached_property
    def layer_state(self) -> int:
        """Bytes of the states of one memory layer and micro-batch."""
        channels = self.config.training.micro_batch_size * self.kv_heads * 2 * self.shape.kv_channels
        return state_bytes(self.config.memory.order, channels)

    @cached_property
    def handoff(self) -> str:
        """How states pass between context-parallel ranks."""
        asked = self.config.parallel.memory_handoff
        return choose_handoff(self.context, self.layer_state) if asked == "auto" else asked

    @property
    def layout(self) -> str:
        """Such as `TP 2 (sequence parallel) × PP 4 (2 chunks) × CP 1 × DP 8`."""
        sequence = " (sequence parallel)" if self.sequence_split > 1 else ""
        chunks = f" ({self.chunks} chunks)" if self.chunks > 1 else ""
        return f"TP {self.tensor}{sequence} × PP {self.pipeline}{chunks} × CP {self.context} × DP {self.data}"
