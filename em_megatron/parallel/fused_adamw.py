"""AdamW with the state layout of apex's FusedAdam, for machines that have neither apex nor Transformer Engine.

Megatron-Core checkpoints Adam in one of two ways. The way written for torch.optim.AdamW fails before the first
step and, after loading, lets all parameters share one step tensor that AdamW then advances once per parameter:
a resumed run is wrong without an error. The way written for FusedAdam (an integer `step` in each parameter
group, exp_avg and exp_avg_sq per parameter) has none of this, so this optimizer takes that shape.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adam import adam


class FusedAdamW(torch.optim.Optimizer):
    """Decoupled or L2 Adam on torch's fused kernel (CPU and CUDA).

    State per parameter: exp_avg and exp_avg_sq, of its shape and dtype. Each group holds `step`, the number of
    updates done. `adam_w_mode` chooses AdamW (arXiv 1711.05101) over Adam with L2 regularisation.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError(
                "This AdamW cannot be captured in a CUDA graph: set optimizer_cuda_graph=False, "
                "or install apex or Transformer Engine."
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] += 1
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        # The distributed optimizer leaves empty shards on ranks that own no part of a parameter.
        params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        # torch counts the step in one tensor per parameter and adds one itself.
        steps = torch.full((len(params),), float(group["step"] - 1), device=params[0].device)
        beta1, beta2 = group["betas"]
        adam(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            list(steps.unbind()),
            fused=True,
            decoupled_weight_decay=self.adam_w_mode,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def install() -> bool:
    """Put FusedAdamW where Megatron-Core fell back to torch's Adam; True if it did, False if it has a fused one.

    Also needed on GPUs without apex and Transformer Engine. Call it before get_megatron_optimizer.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if optimizer.Adam is FusedAdamW:
        return True
    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return False
    optimizer.Adam = FusedAdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = FusedAdamW
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
    return True
