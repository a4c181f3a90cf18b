"""``silo.toml``: what a silo is, where its data lies, and what its steward's policy allows."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.parse import parse, read_toml
from configs.schema.base import (
    LARGEST_ADAPTER_VALUE,
    ComposedLabels,
    Count,
    Digest,
    MaxNewTokens,
    Positive,
    Probability,
    Settings,
)
from configs.schema.data import DeidentifySettings, RecordSettings
from configs.schema.federated import ClippingMethod, Train
from configs.schema.places import Place, rooted
from configs.schema.tasks import (
    WRITTEN,
    Pooling,
    Share,
    TaskLabels,
    TaskName,
    TaskSpec,
    augmentation_problem,
    deidentify_problem,
    task_problems,
)

LARGEST_NAME = 100  # characters of a silo's
MOST_SIMULATED_RUNS, MOST_SIMULATED_ROUNDS = 10_000, 100_000  # the requests of a simulation come from its own user


class SiloSettings(Settings):
    """Identity and places of a silo."""

    id: Annotated[str, Field(min_length=1, max_length=LARGEST_NAME)]
    """The silo's name in the federation."""
    dataset_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=255)]
    """The steward's name for the dataset; the ledger is bound to it."""
    state_dir: Annotated[str, Place("keys and ledger", made=True)]
    """Folder of keys and ledger. It outlives runs."""
    anchor_dir: Annotated[str, Place("the ledger's anchor", made=True)] = ""
    """Folder of the ledger's anchor, by which an old ledger that is put back is noticed: one for each dataset, best on
    another disk than ``state_dir``, and never restored with it. Empty: ``<state_dir>.anchor``."""
    base_model: Annotated[str, Place("the base model", secret=False)]
    """Folder of the exported base model that the silo may fine-tune."""
    encryption_key_file: Annotated[str, Place("the encryption key", unless="env:")] = ""
    """File of the base model's key where its weights are encrypted; ``env:`` takes SILOWEAVE_ENCRYPTION_KEY."""
    relay_user: str = ""
    """Operating-system user of the relay, which the service's socket is for. It must reach nothing else of the silo.
    Empty: nobody but the service's own user reaches the socket, which is allowed for data declared public only."""
    public_record_count: Count
    """Training units, rounded, declared by the steward; never computed from the data."""
    micro_batch_size: Count = 16
    """Most units processed at once; speed only: no bit of what leaves under record-level DP depends on it."""
    clipping: ClippingMethod = "bookkeeping"
    """How per-record gradients are formed; all ways give the same up to rounding."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,2})?)$")] = "cpu"
    """What the model computes on: ``cpu``, ``cuda`` or ``cuda:N``; ``auto`` takes the first GPU where there is one.
    Batches and noise are drawn on the processor, the same either way. Not speed only: a GPU rounds differently."""
    gpu_memory_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the GPU's memory that the silo may take."""
    keep_released: bool = False
    """Whether each round's update is kept in ``state_dir`` as it left, with the request that asked for it, for
    `siloweave silo attack`. A round takes about the bytes of two adapters, and nothing deletes them."""


class SiloDataSettings(RecordSettings):
    """The silo's records."""

    silo: str = ""
    """Column that names the silo, where one source holds several; empty: all of the source is this silo's."""
    unit: str = ""
    """Column that names the privacy unit; empty: every record is a unit of its own."""
    max_rows_per_unit: Count = 8
    """Rows kept of one unit."""
    held_out_fraction: Probability = 0.1
    """Share of the units that are never trained on."""
    public: bool = False
    """True only for data that everyone may see."""
    deidentify: DeidentifySettings = DeidentifySettings()
    """What is replaced in the records before they are trained on."""


class SiloPolicy(Settings):
    """What may leave, at most. Every check is computed from these numbers alone, without reading data."""

    units: Annotated[tuple[Literal["record", "client"], ...], Field(min_length=1)] = ("record",)
    """What a run may protect. ``record``: this silo adds the noise, and need not trust whoever asks. Whoever adds
    ``client`` trusts the coordinators: they get this silo's updates without noise, and add the noise to the sum."""
    tasks: Annotated[tuple[TaskName, ...], Field(min_length=1, max_length=1)] = ("causal",)
    """What may be trained and evaluated: ``causal``, the text token by token; ``classification`` or ``multilabel``, its
    label or labels; ``entities``, a tag for each of its words; ``qa``, where in it a question's answer is; ``chat``,
    what the assistant says; ``translation`` or ``summarisation``, a text of a text. Exactly one, since the records are
    read for one task."""
    labels: TaskLabels = ()
    """Labels that may be learnt, in the federation's order; ``[data.labels]`` maps this silo's own words to them."""
    template: str = ""
    """How a text may be made of a record's fields, as the federation has it; empty: the text is the column of that
    name."""
    pooling: Pooling = "model"
    """What of a text the labels' head looks at, or ``likelihood``, as the federation has it."""
    train: Annotated[tuple[Train, ...], Field(min_length=1)] = ("lora",)
    """What of the model may train and travel: ``lora`` adapters, or with ``full``, ``head`` and ``bitfit`` parameters
    of the model itself."""
    base_models: tuple[Digest, ...] = ()
    """Content digests of base models that others have made, which this steward accepts on somebody's signed word that
    public text alone has made them. A model that `siloweave export` wrote needs none."""
    budget_epsilon: Positive
    """Epsilon that the dataset may ever spend."""
    budget_delta: Probability
    """Delta that the dataset may ever spend."""
    max_epsilon_per_run: Positive = 8.0
    """Epsilon of one run."""
    max_epsilon_per_day: Positive | None = None
    """Epsilon of all runs that are reserved within 24 hours. Without it only ``budget_epsilon`` bounds them."""
    min_noise_multiplier: Positive = 0.3
    """Smallest noise multiplier."""
    max_sampling_rate: Probability = 0.1
    """Largest sampling rate."""
    max_steps_per_round: Count = 1000
    """Most steps of one round."""
    max_rounds_per_run: Count = 1000
    """Most rounds of one run; its private evaluations may be one more. Each adds entries to the ledger for good, and
    every start of the silo verifies all of them."""
    min_grad_norm: Positive = 1e-4
    """Smallest norm to which a unit is clipped."""
    max_grad_norm: Positive = 1e4
    """Largest norm to which a unit is clipped."""
    max_learning_rate: Positive = 1.0
    """Largest learning rate of a silo's steps."""
    max_proximal_mu: Positive = 100.0
    """Largest pull of FedProx."""
    max_augmentation: Share = 0.0
    """Largest share of a record's own words that a step may leave out, swap or mask, each by itself; 0: none."""
    max_lora_rank: Count = 64
    """Largest adapter rank."""
    max_lora_alpha: Positive = 1000.0
    """Largest scale of an adapter."""
    max_adapter_value: Positive = LARGEST_ADAPTER_VALUE
    """Largest absolute value in an adapter, or in what SCAFFOLD adds to each step."""
    releases_metrics: bool = False
    """Whether noised sums over the held-out units may leave, charged as any other release."""
    label_sets: tuple[ComposedLabels, ...] = ()
    """Sets of labels, ``[["yes", "no"]]`` for instance, whose noised counts may be among these sums."""
    max_new_tokens: MaxNewTokens = 0
    """Most tokens that a private evaluation may have the model write for each held-out record, one forward pass each,
    so that what they have in common with the record's own answer is among these sums; 0: it may not. For tasks whose
    answer is text."""
    max_request_bytes: Count = 256 * 2**20
    """Bytes of one request, its adapter included; a run says at its start what its largest has. The service holds two
    such requests at a time, and has to be started again for a larger number."""
    max_requests_per_day: Count = 10_000
    """Requests of one trusted coordinator within 24 hours."""
    max_runs_per_day: Count = 50
    """Runs that one coordinator may open within 24 hours, by the ledger's own signed times."""
    max_open_runs: Count = 20
    """Runs of one coordinator that may be open at once. `siloweave silo runs stop` ends one that was left open."""
    requires_mandate: bool = False
    """Whether a mandate (`siloweave silo mandate`) has to cover all that is asked. It has to anyway once one was added;
    with this nothing is answered before that, or should the mandates' folder ever be lost."""
    secure_aggregation: Literal["allowed", "required"] = "allowed"
    """Whether updates may leave as they are, noised, or only in a run that adds them up under masks (``required``), so
    that its coordinator sees the sum alone. The noised sums of a private evaluation leave by themselves either way."""
    min_colluders: Annotated[int, Field(ge=0)] = 0
    """How many silos in league with the coordinator a run with secure aggregation has to withstand at least. Where
    silos make the noise together, one that looks at a model is one of them, since it knows its own share."""
    honest_silos: Annotated[int, Field(ge=0)] = 0
    """How many silos of each sum, this one among them, the steward takes for honest: they add their shares of the
    noise, keep nothing of them and tell nobody. A run may count on so many at most (``privacy.min_honest``), and
    epsilon rests on them. 0: on none, so that noise which silos make together (``privacy.mode = "distributed"``) is
    refused."""
    error_feedback: bool = True
    """Whether a run may have this silo keep, in ``state_dir``, what its updates leave out, and add it to the next one
    (``federated.update_share`` below 1). It is made of noised updates, has the bytes of one, and goes with the run."""
    attests_disjoint_units: bool = False
    """The steward's word, signed with every run, that its units appear in no other silo of the federation. Where every
    silo's steward gives it, the largest epsilon is the federation's; else the sum is."""

    @model_validator(mode="after")
    def _task_is_whole(self) -> "SiloPolicy":
        for problem in task_problems("policy", self.tasks[0], self.labels, self.template, self.pooling):
            raise ValueError(problem)
        if problem := augmentation_problem("policy.max_augmentation", self.tasks[0], self.max_augmentation):
            raise ValueError(problem)
        if self.label_sets and self.tasks[0] != "causal":
            raise ValueError(
                f"policy.label_sets is {[list(labels) for labels in self.label_sets]}: they are for texts that end in "
                f"a label; the task {self.tasks[0]!r} counts its own labels, so leave them out"
            )
        if self.max_new_tokens and self.tasks[0] not in WRITTEN:
            raise ValueError(
                f"policy.max_new_tokens is {self.max_new_tokens}: the answer of the task {self.tasks[0]!r} is no text "
                "that is written; leave it out"
            )
        return self

    @property
    def task_spec(self) -> TaskSpec:
        """What a record is to the model, as requests have to say it."""
        return TaskSpec(name=self.tasks[0], labels=self.labels, template=self.template, pooling=self.pooling)


class SiloConfig(Settings):
    """Everything a silo is configured with."""

    silo: SiloSettings
    data: SiloDataSettings
    policy: SiloPolicy

    @property
    def task_spec(self) -> TaskSpec:
        """What a record is to the model, and in which language this silo's are."""
        return self.policy.task_spec.model_copy(update={"language": self.data.language})

    @model_validator(mode="after")
    def _words_stay(self) -> "SiloConfig":
        if problem := deidentify_problem(self.policy.tasks[0], self.data.deidentify.enabled):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _anchor_is_apart(self) -> "SiloConfig":
        if Path(self.silo.anchor_dir).is_relative_to(self.silo.state_dir):
            raise ValueError(f"silo.anchor_dir is {self.silo.anchor_dir!r}: give a folder outside silo.state_dir")
        return self


def load_silo(path: Path) -> SiloConfig:
    """Reads and checks a ``silo.toml``; relative paths in it are below its own folder.

    Raises:
        InputError: it is missing, unreadable, or a setting does not hold.
    """
    tree = rooted(SiloConfig, read_toml(path), path.parent.resolve(), str(path), fill=True)
    return parse(SiloConfig, tree, str(path))
