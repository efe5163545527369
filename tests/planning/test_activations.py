"""The plan's activations against what built models allocate: peaks of whole steps at real sizes, and saved tensors."""

from __future__ import annotations

import pytest
import torch

from em_megatron.config import RunConfig, load_config
from em_megatron.parallel.process_groups import shutdown
from em_megatron.planning.activations import Activations
from em_megatron.planning.job import Job
from em_megatron.planning.memory import peak_memory, stage_memory
from em_megatron.validate import validate
from tests.multi_rank import Pools
from tests.planning.fake_rank import forms_of_a_gpu, measure

VOCAB = 32000
TENSOR, PIPELINE, CONTEXT, CHUNKS = (
    f"parallel.{axis}={{}}".format
    for axis in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "virtual_pipeline_model_parallel_size",
    )
)
SEQUENCE, DISTRIBUTED = "parallel.sequence_parallel=true", "parallel.use_distributed_optimizer=true"

ONE = "training.global_batch_size=1"

# A tenth above what is measured at most, and never more than a hundredth below.
LOWEST, HIGHEST = 0.99, 1.10


def real_config(recompute: str, *overrides: str) -> RunConfig:
    """The 1b model with few layers, on samples of eight blocks; as many micro-batches as the schedules need."""
    return load_config(
        None,
        ["name=x", "data.path=nowhere", "model.size=1b", "model.num_layers=4", "data.sequence_length=16384",
         "training.global_batch_size=4", "memory.kernels=triton", f"training.recompute={recompute}", *overrides],
    )  # fmt: skip


CASES = {  # name → (ranks, rank measured, recompute, overrides)
    "one rank": (1, 0, "none", (ONE,)),
    "one rank, small vocabulary": (1, 0, "none", ("model.ffn_hidden_size=16384", "model.num_layers=2", ONE)),
    "one rank, fp32": (1, 0, "none", ("training.precision=fp32", "model.num_layers=2", ONE)),
    "selective, two samples, query norms": (
        1, 0, "selective", ("training.micro_batch_size=2", "model.qk_layernorm=true")),
    "full": (1, 0, "full", ("model.share_embeddings_and_output_weights=true", ONE)),
    "tensor": (2, 1, "none", (TENSOR(2), ONE)),
    "tensor and sequence": (8, 3, "selective", (TENSOR(4), SEQUENCE, DISTRIBUTED, "training.global_batch_size=2")),
    "as many key/value heads as ranks": (8, 0, "none", (TENSOR(8), SEQUENCE, ONE)),
    "context": (4, 3, "none", (CONTEXT(4), DISTRIBUTED, ONE)),
    "pipeline, first stage": (4, 0, "none", (PIPELINE(4), TENSOR(1))),
    "pipeline, first stage, full": (8, 1, "full", (PIPELINE(4), TENSOR(2), SEQUENCE)),
    "pipeline, last stage": (4, 3, "selective", (PIPELINE(4),)),
    "interleaved, first stage": (2, 0, "none", (PIPELINE(2), CHUNKS(2))),
    "interleaved, last stage": (2, 1, "none", (PIPELINE(2), CHUNKS(2))),
    "memory in one layer": (2, 0, "none", ("memory.layers=3", PIPELINE(2))),
}  # fmt: skip
OFTEN = ("one rank", "full", "tensor and sequence", "pipeline, first stage", "interleaved, last stage", "context")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in OFTEN else [pytest.mark.slow]) for case in CASES]
)
def test_peak_of_a_step_at_real_sizes(case):
    ranks, rank, recompute, overrides = CASES[case]
    config, vocab = real_config(recompute, *overrides), 2048 if "small vocabulary" in case else VOCAB
    validate_anywhere(config, ranks)
    measured = measure(config, rank, ranks, vocab)
    job = Job(config, ranks, vocab)
    plan = stage_memory(job, rank // (ranks // job.pipeline), bucketed=False)
    assert (plan.weights, plan.gradients) == (measured.weights, measured.gradients)
    planned = plan.activations + plan.communication
    print(
        f"{case}: measured {measured.peak / 2**30:.3f} GiB, plan {planned / 2**30:.3f}, {planned / measured.peak:.3f}"
    )
    assert LOWEST < planned / measured.peak < HIGHEST, measured.at_peak


RECIPES = {  # ranks that a recipe is written for
    "pretrain_125m": 8, "pretrain_400m": 16, "pretrain_1b": 64, "pretrain_1b_256k": 8, "pretrain_3b": 64,
    "pretrain_7b": 128,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_peak_of_a_step_of_a_recipe(recipe):
    config = load_config(f"launch/recipes/{recipe}.yaml", ["memory.kernels=triton"])
    job = Job(config, RECIPES[recipe], VOCAB)
    measured = measure(config, job.tensor * job.context - 1, RECIPES[recipe], VOCAB)
    plan = peak_memory(job, bucketed=False)
    planned = plan.activations + plan.communication
    print(
        f"{recipe}: measured {measured.peak / 2**30:.3f} GiB, plan {planned / 2**30:.3f}, {planned / measured.peak:.3f}"
    )
    assert LOWEST < planned / measured.peak < HIGHEST, measured.at_peak


def validate_anywhere(config: RunConfig, ranks: int) -> None:
    """As on a GPU, where Triton kernels run."""
    validate(load_config(config, ["memory.kernels=auto"]), ranks)


SMALL_VOCAB = 64
SMALL = (
    "name=x", "data.path=nowhere", "data.sequence_length=32", "model.num_layers=2", "model.hidden_size=32",
    "model.num_attention_heads=4", "model.num_query_groups=2", "model.kv_channels=8", "model.ffn_hidden_size=48",
    "memory.block_length=16", "memory.order=12", "memory.slots=8", "memory.bank_cache=null", "memory.kernels=triton",
    "training.precision=bf16", "model.make_vocab_size_divisible_by=8",
)  # fmt: skip


def saved_bytes(overrides: tuple[str, ...], vocab: int) -> int:
    """Bytes that the forward pass of a small model saves for its backward pass, with the kernels in the interpreter."""
    from megatron.core import tensor_parallel

    from em_megatron.model.initialization import initialize_weights
    from em_megatron.ops.block_layout import BlockLayout
    from em_megatron.training import setup

    config = load_config(None, [*SMALL, *overrides])
    layout = setup.initialize_layout(config)
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    rows, tokens = config.training.micro_batch_size, config.data.sequence_length
    with forms_of_a_gpu():
        (model,) = setup.build_chunks(config, layout, vocab, initialize=False)
        initialize_weights([model], seed=1, std=0.02, num_layers=2)
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        held: dict[int, torch.Tensor] = {}

        def pack(saved: torch.Tensor) -> torch.Tensor:
            held[saved.untyped_storage().data_ptr()] = saved
            return saved

        ids = torch.randint(0, vocab, (rows, tokens))
        documents = BlockLayout.single_document(rows, tokens, config.memory.block_length)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            model(ids, None, None, labels=ids, packed_seq_params=documents)
    return sum(saved.untyped_storage().nbytes() for pointer, saved in held.items() if pointer not in parameters)


def planned_saved(overrides: tuple[str, ...], ranks: int, vocab: int) -> int:
    """The plan's figure for the same: layers, the last residual, head, ids."""
    job = Job(load_config(None, [*SMALL, *overrides]), ranks, vocab)
    kept, recompute = Activations.of(job), job.config.training.recompute
    ids = 8 * job.tokens
    return kept.layers(recompute, 2, len(job.memory_layers)) + kept.residual + kept.embedding + kept.head + ids


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("training.recompute=selective", "training.micro_batch_size=2"),
        pytest.param(("training.recompute=full",), marks=pytest.mark.slow),
        pytest.param(("model.qk_layernorm=true", "memory.layers=1"), marks=pytest.mark.slow),
    ],
    ids=["none", "selective", "full", "query norms"],
)
def test_saved_tensors_of_a_small_model(overrides):
    try:
        saved = saved_bytes(overrides, SMALL_VOCAB)
    finally:
        shutdown()
    assert planned_saved(overrides, 1, SMALL_VOCAB) == pytest.approx(saved, rel=0.01)


def test_saved_tensors_on_two_ranks_with_sequence_parallelism(ranks: Pools):
    overrides = (TENSOR(2), SEQUENCE, "training.global_batch_size=1")
    planned = planned_saved(overrides, 2, SMALL_VOCAB)
    for saved in ranks(2).run(saved_bytes, overrides, SMALL_VOCAB):
        assert planned == pytest.approx(saved, rel=0.01)
