"""What noise and batches must look like, whoever makes them."""

import torch


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([first.flatten().double(), second.flatten().double()]))[0, 1].item()


def unrelated(first: torch.Tensor, second: torch.Tensor) -> bool:
    """No correlation beyond 5 standard errors."""
    return abs(correlation(first, second)) < 5 / first.numel() ** 0.5


def sampling_figures(inclusion: torch.Tensor, rate: float) -> dict[str, float]:
    """How far inclusions (steps, units) are from independent ones with this probability, in standard errors.

    ``rate``: the share of inclusions. ``size``: the variance of batch sizes, over the binomial's. ``pairs``: the
    largest correlation of two units.
    """
    steps, units = inclusion.shape
    inclusion = inclusion.double()
    variance = rate * (1 - rate)
    first = inclusion[:, : min(units, 60)]
    pairs = torch.corrcoef(first.T).nan_to_num() - torch.eye(first.shape[1])
    return {
        "rate": ((inclusion.mean() - rate).abs() / (variance / inclusion.numel()) ** 0.5).item(),
        "size": (inclusion.sum(dim=1).var() / (units * variance)).item(),
        "pairs": (pairs.abs().max() * steps**0.5).item(),
    }


def is_poisson(figures: dict[str, float], steps: int) -> bool:
    """Within 5 standard errors of Poisson sampling; 6 for the largest of some 2,000 pairs."""
    return figures["rate"] < 5 and figures["pairs"] < 6 and abs(figures["size"] - 1) < 5 * (2 / steps) ** 0.5
