"""All settings of a run, in one frozen tree. Unknown keys are refused; every field says its meaning and unit.

Fields that change a privacy guarantee live in ``PrivacySettings``; fields that change only speed never do.
"""

from typing import Annotated

from pydantic import Field, model_validator

from configs.schema.base import Count, MaxNewTokens, Positive, Settings
from configs.schema.data import DATA, DataSettings, RecordSettings, TokenizerSettings, corpora
from configs.schema.federated import ROBUST, FederatedSettings
from configs.schema.monitoring import MonitoringSettings
from configs.schema.places import Place
from configs.schema.pretrain import (
    ANY_MODEL,
    OBJECTIVES,
    RECURRENT,
    ClusterSettings,
    ModelSettings,
    Objective,
    PretrainSettings,
)
from configs.schema.rounds.privacy import PrivacySettings
from configs.schema.rounds.secure import rounds_problem
from configs.schema.stages import Stage, TrainingStage, model_problems, resolved, stage_at, stage_problems
from configs.schema.tasks import WRITTEN, deidentify_problem

LARGEST_RUN_NAME = 220  # a file system holds 255 bytes: a run that is set aside gets its time as well
LARGEST_NUMBER_OF_CLIENTS = 2**16  # an exact sum has room for so many updates


class RunSettings(Settings):
    """Where a run lives and what makes it repeatable."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=LARGEST_RUN_NAME)]
    """Name of the run's directory below ``storage``."""
    storage: Annotated[str, Place("the runs", made=True, unless=".*://.*")] = "runs"
    """Folder where runs live, or the URL of an object store (``s3://bucket/prefix``: needs the extra ``s3``; others as
    fsspec knows them). On a cluster: an absolute folder that every node shares, or a URL."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything public: tokenizer, initial weights, order of the public data. Never of privacy noise."""
    encryption_key_file: Annotated[str, Place("the encryption key", unless="env:")] = ""
    """File of the key that encrypts checkpoints, base model and adapters on disk; ``env:`` takes the key from
    SILOWEAVE_ENCRYPTION_KEY. Empty means ``env:`` where that variable is set, and no encryption where it is not."""

    @model_validator(mode="after")
    def _storage_lasts(self) -> "RunSettings":
        if self.url is None:
            return self
        protocol, _, rest = self.storage.partition("://")
        if protocol in ("file", "local", "memory") or "::" in self.storage or not rest.strip("/"):
            raise ValueError(f"run.storage is {self.storage!r}: give a folder, or a URL such as s3://bucket/prefix")
        if "@" in rest:  # not repeated here: it would stand in logs
            raise ValueError(
                "run.storage holds credentials: leave them out, and set the store's own environment variables"
            )
        return self

    @property
    def url(self) -> str | None:
        """Where the run is in an object store; None where ``storage`` is a folder."""
        return f"{self.storage.rstrip('/')}/{self.name}" if "://" in self.storage else None


class OwnText(RecordSettings):
    """A text that is no silo's."""

    source: Annotated[str, DATA] = ""
    """Where the text comes from, written as for every source; empty: none."""


class EvaluateSettings(Settings):
    """Evaluation on held-out records and a sample of text."""

    public: OwnText = OwnText()
    """A public text of one's own, which every round is scored on, wherever the silos are."""
    max_records_per_silo: Count = 200
    """Held-out records read for each silo, and of the public text."""
    max_new_tokens: MaxNewTokens = 64
    """Tokens that the base model and the final ones write for each of these records, at most, where the task's answer
    is text; each takes a forward pass. 0: they write none, and their texts are not compared."""
    without_dp: bool = False
    """Also run the same federation without DP, to show what privacy costs; needs ``data.private.public``."""
    prompt: str = "What is"
    """Start of the generated sample."""
    prompts: tuple[str, ...] = ()
    """What the demo's page asks every model; empty: ``prompt``, where the model writes."""
    sample_tokens: Count = 80
    """Tokens to generate."""
    temperature: Positive = 0.8
    """Softmax temperature of the sample."""


class TuneSettings(Settings):
    """When ``siloweave tune`` stops a trial early: asynchronous successive halving (ASHA)."""

    early_stopping: bool = True
    """Stop trials whose validations are worse than others' at the same step."""
    grace_steps: Annotated[int, Field(ge=0)] = 0
    """No trial is stopped before this step; 0: ``pretrain.validate_every``."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """Of the trials that reach a rung (the grace steps times a power of this), the best one in this many goes on."""


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
    tune: TuneSettings = TuneSettings()

    @property
    def world_sizes(self) -> list[int]:
        """The numbers of ranks that a start may have, largest first."""
        most = self.cluster.world_size
        return [size for size in range(most, (self.cluster.min_world_size or most) - 1, -1) if self._shares(size)]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of pretraining; one where the file names none."""
        weights = {name: source.weight for name, source in corpora(self.data).items()}
        stages = self.pretrain.stages or (TrainingStage(steps=self.pretrain.steps),)
        return resolved(stages, self.model.context_length, weights)

    def stage_at(self, step: int) -> Stage:
        """The stage of a step, which is counted from 0."""
        return self.stages[stage_at([stage.steps for stage in self.stages], step)[0]]

    @property
    def objective(self) -> Objective:
        """What the base model is pretrained on."""
        named = self.pretrain.objective
        return self._objectives[0] if named == "auto" else named

    @property
    def _objectives(self) -> tuple[Objective, ...]:
        return ANY_MODEL if self.model.config else OBJECTIVES[self.model.family]

    @model_validator(mode="after")
    def _objective_fits(self) -> "RunConfig":
        model, pretrain = self.model, self.pretrain
        if model.source:
            return self
        if self.objective not in self._objectives:
            what = "model.config" if model.config else f"model.family {model.family!r}"
            raise ValueError(
                f"pretrain.objective is {self.objective!r}: {what} is pretrained by {' or '.join(self._objectives)}; "
                "give one of these, or another model.family"
            )
        if pretrain.activation_checkpointing and not model.config and model.family in RECURRENT:
            raise ValueError(
                f"pretrain.activation_checkpointing is true: model.family {model.family!r} has no blocks to compute "
                "again; give false"
            )
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> "RunConfig":
        model, layers = self.model, None if self.model.config else self.model.layers
        if not model.source:
            for problem in stage_problems(self.pretrain.stages, corpora(self.data), model.context_length, layers):
                raise ValueError(problem)
        for number, stage in enumerate(self.federated.stages):
            own = None if model.source else layers
            for problem in model_problems(f"federated.stages.{number}", stage, model.context_length, own):
                raise ValueError(problem)
        return self

    def _shares(self, size: int) -> bool:
        """Whether so many ranks can share the batch."""
        return self.pretrain.batch_size % (size * self.pretrain.micro_batch_size) == 0

    @model_validator(mode="after")
    def _words_stay(self) -> "RunConfig":
        if problem := deidentify_problem(self.federated.task, self.data.deidentify.enabled):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _answers_are_written(self) -> "RunConfig":
        most, task = self.privacy.evaluation_max_new_tokens, self.federated.task
        if most and task not in WRITTEN:
            raise ValueError(
                f"privacy.evaluation_max_new_tokens is {most}: the answer of the task {task!r} is no text that is "
                "written; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if not self.data.public and not self.model.source:
            raise ValueError(
                "data.public: missing; give the text that the base model is pretrained on, or another base model in "
                "model.source"
            )
        if self.privacy.evaluation_labels and self.federated.task != "causal":
            raise ValueError(
                f"privacy.evaluation_labels is {list(self.privacy.evaluation_labels)}: they are for texts that end in "
                f"a label; the task {self.federated.task!r} counts federated.labels, so leave them out"
            )
        ranks, pretrain, private = self.cluster.world_size, self.pretrain, self.data.private
        if ranks not in self.world_sizes:
            fitting = [str(size) for size in range(1, pretrain.batch_size + 1) if self._shares(size)]
            raise ValueError(
                f"pretrain.batch_size is {pretrain.batch_size}: give a multiple of cluster.world_size "
                f"({ranks}) times pretrain.micro_batch_size ({pretrain.micro_batch_size}); with these batches "
                f"cluster.world_size can be {', '.join(fitting) or 'no number at all'}"
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
        if self.privacy.evaluations > self.federated.rounds + 1:
            raise ValueError(
                f"privacy.evaluations is {self.privacy.evaluations}: there are {self.federated.rounds} rounds and "
                "the base model to evaluate; give at most federated.rounds + 1"
            )
        if self.federated.optimizer == "adam_bc" and self.privacy.clipping_function == "quantile":
            raise ValueError(
                "federated.optimizer is 'adam_bc': it needs noise of one size, and privacy.clipping_function "
                "'quantile' changes it; give 'adam' or 'fixed'"
            )
        if problem := self._client_problem() or rounds_problem(dict(self.federated), dict(self.privacy)):
            raise ValueError(problem)
        if self.evaluate.without_dp and not private.public:
            raise ValueError(
                "evaluate.without_dp is true: the run without DP exists only for data declared "
                "data.private.public = true; set evaluate.without_dp = false"
            )
        return self

    def _client_problem(self) -> str:
        """What an aggregator that adds the noise can't do, or what would need noise of the silos' own."""
        privacy, federated = self.privacy, self.federated
        if privacy.unit == "record":
            wrong = f"privacy.num_clients is {privacy.num_clients}: give 0 with privacy.unit 'record'"
            return wrong if privacy.num_clients else ""
        most = min(LARGEST_NUMBER_OF_CLIENTS, int(0.1 / privacy.delta))
        if not federated.min_silos <= privacy.num_clients <= most:
            return (
                f"privacy.num_clients is {privacy.num_clients}: with privacy.unit 'client' give federated.min_silos "
                f"({federated.min_silos}) to {most}"
            )
        refused = (  # setting, value, whether it is refused, why, what to give
            ("federated.aggregation", federated.aggregation, federated.aggregation in (*ROBUST, "scaffold"),
             "it uses single clients' updates, and only their sum has noise", "'fedavg' or a server optimizer"),
            ("federated.adapters", federated.adapters, federated.adapters == "product",
             "a product of factors has another norm than what was clipped", "'average' or 'ffa'"),
            ("federated.enough_silos", federated.enough_silos, federated.enough_silos > 0,
             "one client's speed would decide whether another one counts", "0"),
            ("federated.schedule", federated.schedule, federated.schedule != "synchronous",
             "one client's speed would decide how much another one counts", "'synchronous'"),
            ("federated.required_silos", federated.required_silos, bool(federated.required_silos),
             "that there is a model would show that they take part", "none"),
            ("federated.update_share", federated.update_share, federated.update_share < 1,
             "what an update leaves out has no noise, and would be kept at the silo", "1"),
            ("federated.optimizer", federated.optimizer, federated.optimizer == "adam_bc",
             "a silo's own steps have no noise to correct for", "'adam' or 'sgd'"),
            ("privacy.sampler", privacy.sampler, privacy.sampler != "poisson",
             "its cap is about records", "'poisson'"),
            ("privacy.clipping_function", privacy.clipping_function, privacy.clipping_function != "fixed",
             "it is about records' gradients", "'fixed'"),
            ("privacy.evaluations", privacy.evaluations, privacy.evaluations > 0,
             "a private evaluation is about records", "0"),
            ("evaluate.without_dp", self.evaluate.without_dp, self.evaluate.without_dp,
             "the run without DP is the one of records", "false"),
        )  # fmt: skip
        problems = (
            f"{name} is {value!r} with privacy.unit 'client': {why}; give {instead}"
            for name, value, applies, why, instead in refused
            if applies
        )
        return next(problems, "")
