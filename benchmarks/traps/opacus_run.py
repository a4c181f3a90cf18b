"""A private training with Opacus, as its documentation sets one up."""

from typing import Any

import torch
from torch import nn

from traps.engine import Averaged
from traps.layers import records

SIGMA, MAX_GRAD_NORM = 0.8, 0.5


class Run:
    """A private training of its own, with plain descent at rate 1."""

    def __init__(
        self, model: nn.Module | None = None, num_records: int = 100, batch_size: int = 10, **options: Any
    ) -> None:
        from opacus import PrivacyEngine
        from torch.utils.data import DataLoader, TensorDataset

        self.engine = PrivacyEngine(**{name: options.pop(name) for name in ("secure_mode",) if name in options})
        self.data = TensorDataset(records(num_records), torch.arange(num_records))
        model = model or Averaged(nn.Embedding(10, 4))
        self.model, self.optimizer, self.loader = self.engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            data_loader=DataLoader(self.data, batch_size=batch_size, shuffle=True),
            **{"noise_multiplier": SIGMA, "max_grad_norm": MAX_GRAD_NORM, **options},
        )

    def weights(self) -> torch.Tensor:
        return torch.cat([value.detach().flatten() for value in self.model.parameters()])

    def step(self, x_B: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """What the weights lost in one step."""
        before = self.weights()
        self.optimizer.zero_grad()
        (self.model(x_B).square().mean(dim=1).mean() * scale).backward()
        self.optimizer.step()
        return before - self.weights()

    def steps_accounted(self) -> int:
        return sum(steps for _, _, steps in self.engine.accountant.history)
