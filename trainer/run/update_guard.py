"""Keep bad numbers away from the weights without asking the host.

The host would have to wait for the losses of a step before it may ask for the update. A fused AdamW looks itself: its
kernel reads `found_inf` on the device, and where that is 1, it leaves weights, moments and step counts as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class UpdateGuard:
    """From the first loss or gradient that is not finite on, the optimiser's steps change nothing, until `forget`.

    Later steps as well, because they may be on their way before the host has read of the bad one. Equal on all ranks,
    as the numbers are. Only for a fused optimiser (`is_active`).
    """

    def __init__(self, optimizer: torch.optim.AdamW) -> None:
        first = optimizer.param_groups[0]["params"][0]
        # torch's fused AdamW takes no `found_inf` beside sharded parameters.
        self.is_active = bool(optimizer.defaults["fused"]) and not isinstance(first, DTensor)
        self._found = torch.zeros((), device=first.device)  # 0 or 1
        if self.is_active:
            # As torch's GradScaler does for one step.
            optimizer.found_inf, optimizer.grad_scale = self._found, None  # type: ignore[attr-defined]

    def see(self, numbers: Tensor) -> None:
        """Look at a step's losses and gradient norm [K], after its backward pass and before its update."""
        torch.maximum(self._found, (~numbers.isfinite().all()).to(self._found), out=self._found)

    def forget(self) -> None:
        """Let the next step update the weights, if it is finite."""
        self._found.zero_()
