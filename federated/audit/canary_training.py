"""An audit's training run: canaries among public text, through the engine that the silos use. No private data is read.

Three ways to look at it, each from released values alone: the noised gradients of the canary layer, those of the
adapter, and the final model's losses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.func import functional_call, jvp

from configs.errors import SiloweaveError
from privacy.audit.attacks import exposure
from privacy.audit.bound import Finding, fair_coins, judge, num_guesses
from privacy.audit.canaries import NO_CANARY, CanaryLayer, Released, gradient_scores
from privacy.mechanism.dp_sgd import PrivateTraining
from privacy.mechanism.streams import Streams
from privacy.plan import PlanTerms
from trainer.models.adapters import trainable
from trainer.scoring.record_losses import record_losses
from trainer.tasks.task import Encoded, TextTask

GRADIENT, WHITE_BOX, BLACK_BOX = "gradient_white_box", "example_white_box", "example_black_box"
_CANDIDATES, _SCORED_AT_ONCE, _PROBE = 1024, 128, "probe.layer.weight"


@dataclass(frozen=True)
class AuditSettings:
    """What an audit trains on; fixed before it starts.

    Attributes:
        gradient_canaries: canaries that are one coordinate of the gradient.
        example_canaries: canaries that are random tokens.
        example_tokens: length of one of these.
        record_count: stands for the silo's public record count: only the normaliser depends on it.
        learning_rate: of Adam.
        micro_batch_size: records processed at once; speed only.
    """

    gradient_canaries: int
    example_canaries: int
    example_tokens: int
    record_count: int
    learning_rate: float
    micro_batch_size: int

    def modes(self, terms: PlanTerms) -> dict[str, tuple[int, float]]:
        """The scores that will be tried, each with its number of guesses and its share of the allowed error.

        Gradient canaries show most, and at 99.9% confidence there is little error to share: they get nine tenths of it.
        """
        gradient = num_guesses(terms, self.gradient_canaries)
        if not self.example_canaries:
            return {GRADIENT: (gradient, 1.0)}
        examples = num_guesses(terms, self.example_canaries)
        return {GRADIENT: (gradient, 0.9), WHITE_BOX: (examples, 0.05), BLACK_BOX: (examples, 0.05)}


@dataclass
class AuditTraining:
    """One audit's training and what was released by it.

    Args:
        terms: the plan whose claim is audited.
        settings: canaries and speed.
        model: base model with a fresh adapter; is trained in place.
        task: makes records of tokens and losses of records.
        background: public records to train among.
        design_digest: digest of all that was fixed beforehand; salts the noise.
    """

    terms: PlanTerms
    settings: AuditSettings
    model: Any
    task: TextTask
    background: Sequence[Encoded]
    design_digest: str
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.plan = self.terms.bind(self.settings.record_count)
        self._probe = CanaryLayer(self.settings.gradient_canaries, self.terms.max_grad_norm)
        self._whole = nn.ModuleDict({"model": self.model, "probe": self._probe})
        self._gradient_coins = fair_coins(self.settings.gradient_canaries)
        self._example_coins = fair_coins(self.settings.example_canaries)
        self._examples = self._random_records(self.settings.example_canaries)
        self._stand_in = self.task.encode("")

    def _random_records(self, count: int) -> list[Encoded]:
        """Random tokens, all records of one length: what a leaked key or number looks like to a model."""
        shape = (count, self.settings.example_tokens)
        tokens = np.random.default_rng().integers(1, self.model.config.vocab_size, size=shape)
        return [Encoded((0, *row, 0), characters=len(row), truncated=False) for row in tokens.tolist()]

    def train(self, on_step: Callable[[], None], seed: Callable[[int], bytes]) -> None:
        """Runs the plan's whole schedule, each round with a seed and an optimizer of its own, as in a silo.

        Args:
            on_step: called before each step.
            seed: gives the seed of a round, from 1 on.
        """
        included = [record for record, heads in zip(self._examples, self._example_coins, strict=True) if heads]
        units = [(record, NO_CANARY) for record in [*self.background, *included]]
        units += [(self._stand_in, int(canary)) for canary in np.flatnonzero(self._gradient_coins)]
        synthetic = [(self.task.encode(text), NO_CANARY) for text in ("1 2", "1 2 3 4")] + [(self._stand_in, 0)]
        for number in range(1, self.terms.rounds + 1):
            parameters = trainable(self._whole)
            optimizer = torch.optim.Adam(list(parameters.values()), lr=self.settings.learning_rate)
            # Without example canaries only the canary layer is looked at: a large adapter's steps need not be kept.
            kept = parameters if self.settings.example_canaries else {_PROBE: parameters[_PROBE]}
            released = Released(optimizer, kept)
            optimizer.register_step_pre_hook(lambda *_: on_step())
            PrivateTraining(
                self.plan,
                self._whole,
                optimizer,
                unit_losses=self._losses,
                shape_of=lambda unit: self.task.shape(unit[0]),
                made_up=lambda length, number: [(record, NO_CANARY) for record in self.task.made_up(length, number)],
                micro_batch_size=self.settings.micro_batch_size,
                synthetic=synthetic,
            ).run(Streams(seed(number), self.design_digest), [(unit,) for unit in units])
            self.gradients += released.gradients
            self.weights += released.weights

    def _losses(self, units: Sequence[tuple[Encoded, int]]) -> torch.Tensor:
        canaries_B = torch.tensor([canary for _, canary in units])
        text_B = self.task.record_losses(self.model, self.task.collate([record for record, _ in units]))
        # A gradient canary's stand-in text counts for nothing: its gradient is one coordinate of the canary layer
        # alone.
        losses_B: torch.Tensor = text_B * (canaries_B == NO_CANARY) + self._probe(canaries_B)
        return losses_B

    def findings(self) -> list[Finding]:
        """What each way of looking shows about the plan's claim.

        Raises:
            SiloweaveError: the training diverged. A canary whose loss isn't finite adds nothing to a step, and so would
                go unseen.
        """
        if not np.isfinite(self.losses([self._stand_in])).all():
            raise SiloweaveError("audit: its training diverged, and so it shows nothing; lower federated.learning_rate")
        scores = {GRADIENT: gradient_scores(self.plan, self.gradients, _PROBE)}
        if self.settings.example_canaries:
            scores |= {WHITE_BOX: self._white_box_scores(), BLACK_BOX: self._black_box_scores()}
        return [
            judge(
                mode,
                scores[mode],
                self._gradient_coins if mode == GRADIENT else self._example_coins,
                guesses,
                epsilon=self.terms.epsilon,
                delta=self.terms.delta,
                share=share,
            )
            for mode, (guesses, share) in self.settings.modes(self.terms).items()
        ]

    def _white_box_scores(self) -> npt.NDArray[np.float64]:
        """Each step's released gradient times the canary's gradient at the same weights, summed over steps."""
        scores = np.zeros(len(self._examples))
        for weights, gradients in zip(self.weights, self.gradients, strict=True):
            scores += self._slopes(_of_model(weights), _of_model(gradients))
        return scores

    def _slopes(self, weights: dict[str, torch.Tensor], direction: dict[str, torch.Tensor]) -> npt.NDArray[np.float64]:
        """Change of each canary's loss along a direction: one forward-mode pass, not a gradient per canary."""
        slopes = []
        for start in range(0, len(self._examples), _SCORED_AT_ONCE):
            batch = self.task.collate(self._examples[start : start + _SCORED_AT_ONCE])

            def losses(at: dict[str, torch.Tensor], batch: dict[str, torch.Tensor] = batch) -> torch.Tensor:
                return self.task.record_losses(lambda **inputs: functional_call(self.model, at, (), inputs), batch)

            slopes.append(jvp(losses, (weights,), (direction,))[1])
        return torch.cat(slopes).detach().double().numpy()

    def _black_box_scores(self) -> npt.NDArray[np.float64]:
        """How far training lowered each canary's loss (Yeom et al. 2018, against the model before)."""
        with self.model.disable_adapter():
            before = self.losses(self._examples)
        return before - self.losses(self._examples)

    def losses(self, records: Sequence[Encoded]) -> npt.NDArray[np.float64]:
        """Losses of records under the model as it is now, (N,), in their order."""
        return record_losses(self.model, self.task, records, self.settings.micro_batch_size)

    def exposure(self) -> dict[str, Any]:
        """Mean exposure of the example canaries that were in, and of those that were not, in bits."""
        bits = exposure(self.losses(self._examples), self.losses(self._random_records(_CANDIDATES)))
        coins = self._example_coins
        return {
            "candidates": _CANDIDATES,
            "bits_in": float(bits[coins].mean()),
            "bits_out": float(bits[~coins].mean()),
            "bits_in_largest": float(bits[coins].max()),
        }


def _of_model(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): value for name, value in values.items() if name.startswith("model.")}
