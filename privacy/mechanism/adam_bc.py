"""Adam whose second moment is freed of the noise's share (Tang, Shpilevskiy, Lécuyer 2023, "DP-AdamBC").

Noise of variance v in every gradient adds v to Adam's second moment, and where gradients are small it is all that is
there: steps then have the size of noise over noise. The variance is public, and so it can be subtracted. All this works
on noised values only.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class AdamBC(torch.optim.Optimizer):
    """Adam with private second-moment bias correction.

    Args:
        parameters: to train.
        lr: learning rate.
        noise_std: standard deviation of the noise in a gradient: sigma * C / expected batch size.
        betas: decay of the two moments.
        floor: what is left of the second moment is at least ``floor`` times the noise's variance.

    Raises:
        ValueError: noise_std or floor isn't above 0; without noise take torch.optim.Adam.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        lr: float,
        noise_std: float,
        betas: tuple[float, float] = (0.9, 0.999),
        floor: float = 0.1,
    ) -> None:
        if not (noise_std > 0 and floor > 0):
            raise ValueError(f"noise_std is {noise_std} and floor {floor}: give values above 0")
        super().__init__(parameters, {"lr": lr, "betas": betas, "noise_std": noise_std, "floor": floor})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # one return type
        """One update from the gradients that are set.

        Raises:
            ValueError: a closure was given: it would look at un-noised losses.
        """
        if closure is not None:
            raise ValueError("a closure would look at losses without noise; call step() alone")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(step=0, first=torch.zeros_like(parameter), second=torch.zeros_like(parameter))
        state["step"] += 1
        (first_decay, second_decay), variance = group["betas"], group["noise_std"] ** 2
        state["first"].lerp_(gradient, 1 - first_decay)
        state["second"].mul_(second_decay).addcmul_(gradient, gradient, value=1 - second_decay)
        mean = state["first"] / (1 - first_decay ** state["step"])
        signal = state["second"] / (1 - second_decay ** state["step"]) - variance
        parameter.sub_(group["lr"] * mean / signal.clamp(min=group["floor"] * variance).sqrt())
