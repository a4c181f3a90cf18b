"""Small models with the layers that per-record gradients get wrong, and the oracle: one ordinary backward a record.

Every model maps a batch x, first dimension B, to y of shape (B, K). A record's loss is the mean of its y squared.
"""

import copy
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from traps.cell import Cell, first_line

RIGHT = 1e-4  # relative error of the clipped sum
OPACUS_MODES = ("hooks", "functorch", "ew", "ghost")


class Tokens(nn.Module):
    """Embeds tokens, puts an inner module on them, and averages over the sequence."""

    def __init__(self, inner: nn.Module, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6, padding_idx=padding_idx)
        self.inner = inner
        self.head = nn.Linear(6, 4)

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.embedding(x_BT)).tanh()).mean(dim=1)


class Tied(nn.Module):
    """One weight as embedding and as head: as two modules, or by a function that no hook sees."""

    def __init__(self, *, by_module: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        nn.init.normal_(
            self.embedding.weight, std=0.1
        )  # small, as transformers have it: most of its gradient is the head's
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 10, bias=False) if by_module else None
        if self.head is not None:
            self.head.weight = self.embedding.weight

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        hidden_BTD = 10 * functional.layer_norm(self.inner(self.embedding(x_BT)), (6,))
        if self.head is not None:
            return self.head(hidden_BTD).mean(dim=1)
        return functional.linear(hidden_BTD, self.embedding.weight).mean(dim=1)


class Output(nn.Module):
    """A transformers model as x -> y: its first output, averaged over the sequence."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids=x_BT)[0].mean(dim=1)


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Tokens(Conv1D(6, 6))


def gpt2() -> nn.Module:
    """Its position ids have the shape (1, T) and are broadcast over the batch."""
    from transformers import GPT2Config, GPT2Model

    sizes = {"vocab_size": 10, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager")
    return Output(GPT2Model(config))


def lora() -> nn.Module:
    from configs.schema.pretrain import ModelSettings
    from trainer.models.adapters import add_adapter, trainable
    from trainer.models.families import new_model

    settings = ModelSettings(hidden_size=8, layers=1, heads=2, intermediate_size=12, context_length=16)
    model = add_adapter(new_model(settings, 10, seed=1), 2, 4.0, seed=2)
    with torch.no_grad():  # B is zero at the start, and with it A's gradient
        for name, value in trainable(model).items():
            if "lora_B" in name:
                value.normal_(0.0, 0.1)
    return Output(model)


@dataclass(frozen=True)
class Layer:
    """A model with one of the traps in it."""

    title: str
    make: Callable[[], nn.Module]

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return self.make().train()


LAYERS = {
    "linear": Layer("Linear", lambda: Tokens(nn.Linear(6, 6))),
    "embedding": Layer("Embedding, repeated tokens", lambda: Tokens(nn.Identity())),
    "padding_idx": Layer("Embedding, padding_idx", lambda: Tokens(nn.Identity(), padding_idx=0)),
    "layer_norm": Layer("LayerNorm", lambda: Tokens(nn.LayerNorm(6))),
    "rms_norm": Layer("RMSNorm", lambda: Tokens(nn.RMSNorm(6))),
    "conv1d": Layer("Conv1D of GPT-2", conv1d),
    "lora": Layer("LoRA on every linear layer of a Llama", lora),
    "module_tie": Layer("weight tied by two modules", lambda: Tied(by_module=True)),
    "functional_tie": Layer("weight tied by a function", lambda: Tied(by_module=False)),
    "broadcast": Layer("size-1 broadcast input (GPT-2's position ids)", gpt2),
}


def records(num_records: int = 32, seed: int = 0) -> torch.Tensor:
    """Token ids (B, T) below 10, T = 12: every record repeats tokens, most hold the padding id 0."""
    return torch.randint(0, 10, (num_records, 12), generator=torch.Generator().manual_seed(seed))


def record_losses(model: nn.Module, x_B: torch.Tensor) -> torch.Tensor:
    return model(x_B).square().mean(dim=1)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def gradients_of(model: nn.Module, x_B: torch.Tensor) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
    """Norm and ordinary gradient of each record alone."""
    parameters = trainable(model)
    for one in x_B:
        gradients = torch.autograd.grad(record_losses(model, one[None]).sum(), list(parameters.values()))
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        yield norm, dict(zip(parameters, gradients, strict=True))


def median_norm(model: nn.Module, x_B: torch.Tensor) -> float:
    """As clipping norm it clips half of the records."""
    return statistics.median(norm for norm, _ in gradients_of(model, x_B))


def per_record_loop(model: nn.Module, x_B: torch.Tensor, max_grad_norm: float) -> dict[str, torch.Tensor]:
    """The oracle: clips the ordinary gradient of each record alone and adds."""
    total = {name: torch.zeros_like(value) for name, value in trainable(model).items()}
    for norm, gradients in gradients_of(model, x_B):
        for name, gradient in gradients.items():
            total[name] += gradient * min(1.0, max_grad_norm / (norm + 1e-6))
    return total


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of the expected sum; infinite for what is not finite."""
    difference = torch.cat([(found[name] - value).flatten() for name, value in expected.items()]).norm()
    whole = torch.cat([value.flatten() for value in expected.values()]).norm()
    error = (difference / whole).item()
    return error if error == error else float("inf")  # noqa: PLR0124 -- not a number


class MeanSquare(nn.Module):
    """The losses as a criterion, which is what Opacus' ghost clipping asks for."""

    reduction = "sum"

    def forward(self, y_BK: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        losses_B = y_BK.square().mean(dim=1)
        return losses_B if self.reduction == "none" else losses_B.sum()


def opacus_sum(
    model: nn.Module, x_B: torch.Tensor, mode: str, max_grad_norm: float, physical: int | None = None
) -> dict[str, torch.Tensor]:
    """The clipped sum out of Opacus, used as its documentation says: SGD at rate 1, no noise, sum of losses."""
    from opacus import PrivacyEngine
    from opacus.utils.batch_memory_manager import BatchMemoryManager
    from torch.utils.data import DataLoader, TensorDataset

    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=1.0)
    before = {name: value.detach().clone() for name, value in trainable(model).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hooked, optimizer, *rest = PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(TensorDataset(x_B, torch.zeros(len(x_B))), batch_size=len(x_B)),
            criterion=MeanSquare(),
            noise_multiplier=0.0,
            max_grad_norm=max_grad_norm,
            loss_reduction="sum",
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
        loader = rest[-1]
        largest = physical or len(x_B)
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=largest, optimizer=optimizer) as micro:
            for x, target in micro:
                optimizer.zero_grad()
                criterion = rest[0] if mode == "ghost" else MeanSquare()
                criterion(hooked(x), target).backward()
                optimizer.step()
    return {name: before[name] - value.detach() for name, value in trainable(model).items()}


def largest_record(total: Callable[[torch.Tensor], dict[str, torch.Tensor]], x_B: torch.Tensor) -> float:
    """The norm of what one record adds at most: a bound on it is the guarantee, whatever the sum is."""
    sums = [total(one[None]).values() for one in x_B[:8]]
    return max(torch.stack([value.norm() for value in values]).norm().item() for values in sums)


def opacus_layer(layer: Layer) -> dict[str, Cell]:
    """Opacus' clipped sum in each of its modes beside the oracle."""
    model, x_B = layer.model(), records()
    return {mode: _opacus_mode(model, x_B, mode) for mode in OPACUS_MODES}


def _opacus_mode(model: nn.Module, x_B: torch.Tensor, mode: str) -> Cell:
    norm = median_norm(model, x_B)
    try:
        error = relative_error(opacus_sum(model, x_B, mode, norm), per_record_loop(model, x_B, norm))
        if error < RIGHT:
            return Cell("pass", f"{error:.0e}")
        small = norm / 10  # every record is clipped
        largest = largest_record(lambda one: opacus_sum(model, one, mode, small), x_B) / small
    except Exception as raised:  # what it raises is the evidence
        return Cell("refuses" if is_made_for(raised) else "stops", first_line(raised, 70))
    return Cell("fails", f"off by {error:.2g}, one record adds up to {largest:.2f} C")


def is_made_for(error: Exception) -> bool:
    """Whether an error names the unsupported case, rather than a shape deep inside."""
    named = isinstance(error, (NotImplementedError, ValueError)) or type(error).__module__.startswith("opacus")
    return named or "Expanded" in str(error)
