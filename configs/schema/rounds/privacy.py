"""Settings of the guarantee: what is protected, by whose noise, and how much of it."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.schema.base import ComposedLabels, MaxNewTokens, Positive, Probability, Settings


class PrivacySettings(Settings):
    """What changes the guarantee; the steward's policy bounds each of them."""

    unit: Literal["record", "client"] = "record"
    """What is protected. ``record``: one unit of one silo (see ``data.private.unit``), by noise that the silo adds.
    ``client``: all of a silo, by noise that the aggregator adds; it sees the updates, or with
    ``federated.secure_aggregation`` their sum, and has to be trusted."""
    mode: Literal["single", "distributed"] = "single"
    """Who makes the noise. ``single``: whoever adds noise adds all that is charged. ``distributed``: the silos of a
    secure sum together, each a share, so that a round is one step over all silos' records and has the noise once.
    Epsilon then rests on ``min_honest`` silos of each sum, and stewards have to allow it (``policy.honest_silos``)."""
    min_honest: Annotated[int, Field(ge=0, le=2**14)] = 0
    """With ``distributed``: how many silos of a sum are taken for honest: they add their shares and tell nobody. So
    many shares have the noise that is charged, and fewer silos than these and ``federated.colluders`` are never added
    up. 0 with ``single``."""
    num_clients: Annotated[int, Field(ge=0)] = 0
    """With unit ``client``: the constant that divides the sum of updates, and the most silos that take part. With
    unit ``record``: 0."""
    epsilon: Positive = 8.0
    """Epsilon of this run for one silo; the noise multiplier is calibrated to it."""
    delta: Annotated[float, Field(gt=0, le=1e-5)] = 1e-5
    """Delta of this run; at most min(1e-5, 0.1 / public_record_count)."""
    sampling_rate: Probability = 0.03
    """Probability that a unit is in the batch of a step (Poisson); with unit ``client`` that a record is, which then
    only sets the size of batches."""
    sampler: Literal["poisson", "truncated_poisson"] = "poisson"
    """``truncated_poisson`` keeps a random subset of ``max_batch_size`` units where more are drawn: memory has a fixed
    bound, for a little more noise."""
    max_batch_size: Annotated[int, Field(ge=0)] = 0
    """Cap on the batches of ``truncated_poisson``; 0 with ``poisson``, which has none."""
    max_grad_norm: Positive = 1.0
    """Clipping norm C of one unit's gradient over all trainable parameters; with unit ``client``, of a whole update."""
    clipping_function: Literal["fixed", "automatic", "quantile"] = "fixed"
    """``fixed`` shortens longer gradients to C, ``automatic`` brings all to just below C, ``quantile`` moves C to where
    ``target_quantile`` of a batch is not shortened, by a noised count that is paid from the same epsilon."""
    target_quantile: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of gradients that ``quantile`` leaves unshortened, 0.5 for instance; 0 with the other functions."""
    evaluations: Annotated[int, Field(ge=0)] = 0
    """Number of private evaluations on the silos' held-out units. A single one follows the last round; of several, the
    first is of the base model, and the others are spread evenly over the rounds. Their noise is paid from the same
    epsilon. 0: none."""
    evaluation_noise_multiplier: Positive = 5.0
    """Noise of a private evaluation's sums, as a multiple of the most that one unit can move them."""
    evaluation_labels: ComposedLabels = ()
    """Classes of the private evaluation, for F1: a held-out unit whose text ends in one of them is an example of it.
    The silos' ``policy.label_sets`` has to list them. Empty: no F1."""
    evaluation_max_new_tokens: MaxNewTokens = 0
    """Tokens that a private evaluation has the model write for each held-out record, at most, where the task's answer
    is text: how much they have in common with the right answer (chrF) is then among the sums. The silos'
    ``policy.max_new_tokens`` has to allow it, and each token takes a forward pass. 0: it writes none."""
    budget_epsilon: Positive = 32.0
    """Epsilon that a silo's dataset may ever spend (the simulated steward's policy); with unit ``client``, what the
    aggregator's ledger may spend on the same clients."""
    budget_delta: Probability = 1e-4
    """Delta that may ever be spent, counted by the same ledgers as ``budget_epsilon``."""

    @model_validator(mode="after")
    def _labels_are_read(self) -> "PrivacySettings":
        if self.evaluations:
            return self
        if self.evaluation_labels:
            raise ValueError(
                f"privacy.evaluation_labels is {list(self.evaluation_labels)} and privacy.evaluations is 0: nothing "
                "would be evaluated; give privacy.evaluations, or leave the labels out"
            )
        if self.evaluation_max_new_tokens:
            raise ValueError(
                f"privacy.evaluation_max_new_tokens is {self.evaluation_max_new_tokens} and privacy.evaluations is 0: "
                "nothing would be evaluated; give privacy.evaluations, or leave it out"
            )
        return self
