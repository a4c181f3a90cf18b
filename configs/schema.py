"""All settings of a run, in one frozen tree. Unknown keys are refused; every field says its meaning and unit.

Fields that change a privacy guarantee live in ``PrivacySettings``; fields that change only speed never do.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Probability = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Optimizer = Literal["adam", "adam_bc", "sgd"]
ClippingMethod = Literal["bookkeeping", "opacus_hooks", "opacus_ew", "opacus_ghost"]


class Settings(BaseModel):
    """Base of every group: immutable, and a misspelt key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RunSettings(Settings):
    """Where a run lives and what makes it repeatable."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run's directory below ``storage``."""
    storage: str = "runs"
    """Folder where runs live. On a cluster: an absolute folder that every node shares."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything public: tokenizer, initial weights, order of the public data. Never of privacy noise."""
    encryption_key_file: str = ""
    """File of the key that encrypts checkpoints, base model and adapters on disk; ``env:`` takes the key from
    SILOWEAVE_ENCRYPTION_KEY, and a set SILOWEAVE_ENCRYPTION_KEY does so by itself; empty: nothing is encrypted."""

    @model_validator(mode="after")
    def _local_folder(self) -> "RunSettings":
        if "://" in self.storage:
            raise ValueError(f"run.storage is {self.storage!r}: object stores are not supported yet; give a folder")
        return self


class SourceSettings(Settings):
    """Where records come from: embedded data, a file, a folder, or a Hugging Face dataset."""

    source: str
    """``embedded:NAME``, a path (JSONL, CSV, Parquet, text file, or a folder of them), or ``hf:DATASET``."""
    text: str = "text"
    """Column that holds the text. Text files have this one column: a file is a record."""
    split: str = "train"
    """Split to read from a Hugging Face dataset."""


class PrivateSettings(SourceSettings):
    """The data of the silos, for a simulation on one machine."""

    dataset_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The steward's name for this dataset. Its ledgers outlive runs: a new name is a new privacy budget, so
    change it only when the people in the data have changed."""
    silo: str = "silo"
    """Column that names the silo of a record."""
    unit: str = ""
    """Column that names the privacy unit (a person, a device); empty: every record is a unit of its own."""
    max_rows_per_unit: Count = 8
    """Rows kept of one unit; which ones depends on that unit alone."""
    public: bool = False
    """True only for data that everyone may see: it allows figures read in the clear and the run without DP."""
    public_record_count: Count
    """Training units of a silo, rounded, declared by the steward and never computed from the data."""
    public_record_counts: dict[str, Count] = Field(default_factory=dict)
    """The same for single silos, by name, where they differ."""
    held_out_fraction: Probability = 0.1
    """Share of the units that are never trained on, chosen by a keyed hash of the unit."""

    def record_count(self, silo: str) -> int:
        """The declared number of training units of a silo."""
        return self.public_record_counts.get(silo, self.public_record_count)


class DeidentifySettings(Settings):
    """Replacing what identifies people by ``<KIND>`` before anything else reads a text (Presidio; extra ``deid``).

    Hygiene, not differential privacy: what it misses stays in.
    """

    enabled: bool = False
    """Treat the public corpus and the silos' records."""
    names_file: str = ""
    """File of names, one a line, found as written and in capitals; empty: none."""
    spacy_model: str = ""
    """Installed spaCy model, or its folder, that finds names; empty: none. Never downloaded."""
    countries: tuple[str, ...] = ("us", "uk")
    """Countries whose national ids are looked for, by Presidio's codes."""
    medical_record_pattern: str = r"(?<=\b(?:MRN|medical record(?: (?:number|no))?)[.:# ]{1,3})[A-Z]{0,3}-?\d{5,10}\b"
    """Regular expression of a medical record number; letters of either case."""


class DataSettings(Settings):
    """Public text for pretraining, private text for the silos, and how the public text is cleaned."""

    public: SourceSettings
    """The public corpus. Tokenizer and base model see nothing else."""
    private: PrivateSettings
    """The data of the silos."""
    validation_fraction: Probability = 0.05
    """Share of the public documents held out from pretraining."""
    min_characters: Count = 40
    """Shorter public documents are dropped."""
    near_duplicate_similarity: Annotated[float, Field(ge=0.1, le=0.95)] = 0.8
    """Public documents with at least this Jaccard similarity (5-word shingles, MinHash) count as copies."""
    deidentify: DeidentifySettings = DeidentifySettings()
    """What is replaced in the public corpus and, in a simulation, in the silos' records."""


class TokenizerSettings(Settings):
    """Byte-level BPE, trained on the public corpus only."""

    vocab_size: Annotated[int, Field(ge=260, le=65535)] = 2048
    """Number of tokens, the end-of-text token included."""


class ModelSettings(Settings):
    """A Llama-style decoder (transformers' configuration), started at random."""

    hidden_size: Count = 128
    """Width of the residual stream."""
    layers: Count = 4
    """Number of blocks."""
    heads: Count = 4
    """Attention heads of a block; divides ``hidden_size``."""
    intermediate_size: Count = 384
    """Width of the gated feed-forward layer."""
    context_length: Annotated[int, Field(ge=8)] = 128
    """Longest sequence, in tokens. A longer private record is truncated."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelSettings":
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(
                f"model.heads is {self.heads}: model.hidden_size {self.hidden_size} must be an even multiple of it "
                "(rotary embeddings pair the dimensions)"
            )
        return self


class PretrainSettings(Settings):
    """Pretraining on public text."""

    steps: Count = 600
    """Optimizer steps."""
    batch_size: Count = 8
    """Sequences a step, over all ranks."""
    micro_batch_size: Count = 4
    """Sequences a rank processes at once; the rest is accumulated."""
    learning_rate: Positive = 3e-3
    """Peak learning rate of AdamW."""
    warmup_steps: Annotated[int, Field(ge=0)] = 30
    """Steps of linear warm-up before the cosine."""
    min_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Final learning rate as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay of matrices (norms have none)."""
    max_grad_norm: Positive = 1.0
    """Global gradient norm is clipped to this (optimization, not privacy)."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """DeepSpeed ZeRO stage."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of forward and backward; master weights stay float32."""
    commit_every: Count = 100
    """Steps between committed checkpoints."""
    keep_commits: Annotated[int, Field(ge=2)] = 2
    """Committed checkpoints kept; two at least, so that a damaged newest has one before it."""
    validate_every: Count = 200
    """Steps between validations."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> "PretrainSettings":
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"pretrain.warmup_steps is {self.warmup_steps}: give less than pretrain.steps ({self.steps})"
            )
        return self


class ClusterSettings(Settings):
    """The gang of Ray actors; one actor is one rank."""

    world_size: Count = 2
    """Ranks."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """``auto`` takes a GPU a rank where Ray has enough of them, else CPUs."""
    address: str = ""
    """Ray cluster to join; empty: RAY_ADDRESS, else a Ray of our own on this machine."""
    threads_per_rank: Count = 1
    """Torch threads, and CPUs reserved, of a rank or of a silo worker."""
    max_failures: Annotated[int, Field(ge=0)] = 1
    """Restarts from the last commit after a rank failed, before the run ends with the first cause."""
    standbys: bool = True
    """Keep a warm process for every rank, which takes its place when any rank fails: a restart in about a second. Costs
    about 520 MB of memory a rank, and some seconds of CPU after the first step and after every restart."""
    hang_timeout_s: Positive = 300
    """Seconds without a new phase (data, forward, backward, step, commit, ...) after which a rank counts as failed;
    more than the slowest phase takes."""
    placement_timeout_s: Positive = 60
    """Seconds to wait for the cluster to place the gang."""


class FederatedSettings(Settings):
    """Fine-tuning across silos: LoRA adapters, FedAvg with fixed equal weights."""

    rounds: Count = 3
    """Rounds; every silo takes part in each."""
    local_steps: Count = 12
    """Optimizer steps of a silo in a round."""
    learning_rate: Positive = 5e-3
    """Learning rate inside a silo."""
    optimizer: Optimizer = "adam"
    """Optimizer inside a silo, anew each round; ``adam_bc`` takes the noise's share off Adam's second moment."""
    lora_rank: Count = 16
    """Rank of the adapters, on all linear layers, the output head included."""
    lora_alpha: Positive = 32
    """Scale of the adapters: the update is ``alpha / rank * B A``."""
    workers: Count = 2
    """Processes that host the silos of a simulation."""
    micro_batch_size: Count = 16
    """Records processed at once inside a silo; speed only."""
    clipping: ClippingMethod = "bookkeeping"
    """How per-record gradients are clipped: book-keeping, or one of Opacus' modes; speed only."""
    min_silos: Count = 1
    """Silos that must answer for a round to count."""
    round_timeout_s: Positive = 3600
    """Seconds after which a round goes on without those that have not answered."""
    state_dir: str = "state"
    """Folder of the simulated silos' keys and ledgers. It outlives runs, as a budget does."""


class PrivacySettings(Settings):
    """What changes the guarantee; the steward's policy bounds each of them."""

    unit: Literal["record"] = "record"
    """What is protected: one unit of one silo (see ``data.private.unit``)."""
    epsilon: Positive = 8.0
    """Epsilon of this run for one silo; the noise multiplier is calibrated to it."""
    delta: Annotated[float, Field(gt=0, le=1e-5)] = 1e-5
    """Delta of this run; at most min(1e-5, 0.1 / public_record_count)."""
    sampling_rate: Probability = 0.03
    """Probability that a unit is in the batch of a step (Poisson)."""
    sampler: Literal["poisson", "truncated_poisson"] = "poisson"
    """``truncated_poisson`` keeps a random subset of ``max_batch_size`` units where more are drawn: memory has a fixed
    bound, for a little more noise."""
    max_batch_size: Annotated[int, Field(ge=0)] = 0
    """Cap on the batches of ``truncated_poisson``; 0 with ``poisson``, which has none."""
    max_grad_norm: Positive = 1.0
    """Clipping norm C of one unit's gradient over all trainable parameters."""
    clipping_function: Literal["fixed", "automatic", "quantile"] = "fixed"
    """``fixed`` shortens longer gradients to C, ``automatic`` brings all to just below C, ``quantile`` moves C to where
    ``target_quantile`` of a batch is not shortened, by a noised count that is paid from the same epsilon."""
    target_quantile: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of gradients that ``quantile`` leaves unshortened, 0.5 for instance; 0 with the others."""
    budget_epsilon: Positive = 32.0
    """Epsilon that a silo's dataset may ever spend (the simulated steward's policy)."""
    budget_delta: Probability = 1e-4
    """Delta that a silo's dataset may ever spend."""


class EvaluateSettings(Settings):
    """Evaluation on held-out records and a sample of text."""

    max_records_per_silo: Count = 200
    """Held-out records read for each silo."""
    without_dp: bool = False
    """Also run the same federation without DP, to show what privacy costs; needs ``data.private.public``."""
    prompt: str = "What is"
    """Start of the generated sample."""
    sample_tokens: Count = 80
    """Tokens to generate."""
    temperature: Positive = 0.8
    """Softmax temperature of the sample."""


class MonitoringSettings(Settings):
    """Where a run's events are shown besides ``events.jsonl``."""

    tensorboard: bool = False
    """Write TensorBoard scalars to ``tensorboard/`` in the run's directory; needs the extra ``monitoring``."""


class RunConfig(Settings):
    """Everything that shapes a run."""

    run: RunSettings
    data: DataSettings
    tokenizer: TokenizerSettings = TokenizerSettings()
    model: ModelSettings = ModelSettings()
    pretrain: PretrainSettings = PretrainSettings()
    cluster: ClusterSettings = ClusterSettings()
    federated: FederatedSettings = FederatedSettings()
    privacy: PrivacySettings = PrivacySettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    monitoring: MonitoringSettings = MonitoringSettings()

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        ranks, pretrain, private = self.cluster.world_size, self.pretrain, self.data.private
        if pretrain.batch_size % (ranks * pretrain.micro_batch_size):
            raise ValueError(
                f"pretrain.batch_size is {pretrain.batch_size}: give a multiple of cluster.world_size "
                f"({ranks}) times pretrain.micro_batch_size ({pretrain.micro_batch_size})"
            )
        largest = max([private.public_record_count, *private.public_record_counts.values()])
        if self.privacy.delta > 0.1 / largest:
            raise ValueError(
                f"privacy.delta is {self.privacy.delta:g}: a silo with public_record_count {largest} allows at most "
                f"{0.1 / largest:.3g}; lower privacy.delta"
            )
        if (self.privacy.sampler == "poisson") != (self.privacy.max_batch_size == 0):
            raise ValueError(
                f"privacy.max_batch_size is {self.privacy.max_batch_size} and privacy.sampler "
                f"{self.privacy.sampler!r}: give 0 with 'poisson', a cap with 'truncated_poisson'"
            )
        if self.federated.optimizer == "adam_bc" and self.privacy.clipping_function == "quantile":
            raise ValueError(
                "federated.optimizer is 'adam_bc': it needs noise of one size, and privacy.clipping_function "
                "'quantile' changes it; give 'adam' or 'fixed'"
            )
        if self.evaluate.without_dp and not private.public:
            raise ValueError(
                "evaluate.without_dp is true: the run without DP exists only for data declared "
                "data.private.public = true; set evaluate.without_dp = false"
            )
        return self
