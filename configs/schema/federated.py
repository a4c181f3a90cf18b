"""Settings of the federated fine-tuning: local training, aggregation, adapters."""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from configs.schema.base import Count, CountBySilo, Positive, SecondsBySilo, Settings, SiloNames, StudyName, named_as
from configs.schema.places import Place
from configs.schema.rounds.aggregation import aggregation_problems
from configs.schema.rounds.compression import LARGEST_BLOCK, compression_problems
from configs.schema.rounds.schedule import ROUND_RULES, Schedule, schedule_problems
from configs.schema.rounds.secure import SECURE_RULES, secure_problems
from configs.schema.stages import RoundStage, stage_at
from configs.schema.tasks import (
    NO_AUGMENTATION,
    AugmentationSettings,
    Pooling,
    TaskLabels,
    TaskName,
    TaskSpec,
    augmentation_problem,
    task_problems,
)

MOST_TARGETS = 100  # names of layers in a request

Optimizer = Literal["adam", "adam_bc", "sgd"]
ClippingMethod = Literal["bookkeeping", "opacus_hooks", "opacus_ew"]
Train = Literal["lora", "full", "head", "bitfit"]
BaseDtype = Literal["float32", "bfloat16"]
UpdateDtype = Literal["float32", "bfloat16", "int8", "int4"]
LayerName = Annotated[str, Field(pattern=r"^\w+$", max_length=100)]
LayerNames = Annotated[tuple[LayerName, ...], Field(min_length=1, max_length=MOST_TARGETS)]
Aggregation = Literal[
    "fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "scaffold", "median", "trimmed_mean", "krum"
]
ADAPTIVE: tuple[Aggregation, ...] = ("fedadam", "fedyogi", "fedadagrad")
ROBUST: tuple[Aggregation, ...] = ("median", "trimmed_mean", "krum")

# Settings that only some aggregations read, each with those that read it.
_USED_BY: dict[str, tuple[Aggregation, ...]] = {
    "server_learning_rate": ("fedavg", "fedavgm", *ADAPTIVE, "scaffold"),
    "server_momentum": ("fedavgm", "fedadam", "fedyogi"),
    "server_second_moment_decay": ("fedadam", "fedyogi"),
    "server_tau": ADAPTIVE,
    "byzantine_silos": ("trimmed_mean", "krum"),
    "max_silos": ROBUST,
}


class FederatedSettings(Settings):
    """Fine-tuning across silos: what trains, and rounds in which every silo has the same fixed, public weight."""

    task: TaskName = "causal"
    """What a record is to the model, and what is learnt of it; ``causal``: a text, token by token; ``classification``:
    which one of ``labels`` a text has; ``multilabel``: which of them, any number; ``entities``: which of them, as tags
    (``O``, ``B-NAME``, ``I-NAME``), each of its words has; ``qa``: where in a text a question's answer is; ``chat``:
    what the assistant says in a dialogue; ``translation`` or ``summarisation``: a text of a text."""
    labels: TaskLabels = ()
    """Labels of the federation, in their order, for a task that tells labels apart. Each silo maps its own words to
    them."""
    template: str = ""
    """How a text is made of a record's fields, ``"Title: {title} Text: {text}"`` for instance; empty: the text is the
    column of that name. Of a task that writes, the last field is the answer, which alone is learnt; empty: the model's
    own chat template, or both texts with a blank line between them."""
    pooling: Pooling = "model"
    """What of a text the labels' head looks at: ``model``: what the model's own head does, its first token in BERT, its
    last in a decoder; ``mean``: the mean over its tokens, as models that embed sentences were trained for. With
    ``likelihood`` there is no head: a decoder's answer is the label that it holds likeliest after the text."""
    augmentation: AugmentationSettings = NO_AUGMENTATION
    """What a step changes in the words that it reads."""
    rounds: Count = 3
    """Rounds; every silo takes part in each."""
    local_steps: Count = 12
    """Optimizer steps of a silo in a round."""
    learning_rate: Positive = 5e-3
    """Learning rate inside a silo."""
    optimizer: Optimizer = "adam"
    """Optimizer inside a silo, which starts anew each round; ``adam_bc`` takes the noise's share off Adam's second
    moment."""
    proximal_mu: Annotated[float, Field(ge=0, le=100)] = 0.0
    """FedProx: how strongly a silo's steps are drawn back to the shared adapter; 0: not at all."""
    continue_from: Annotated[str, Place("the earlier run")] = ""
    """Directory of an earlier run with the same base model, whose adapter (or trained parameters) this federation
    starts from; empty: from the base model. Its certificate is laid beside this run's own."""
    anchor: Annotated[float, Field(ge=0, le=100)] = 0.0
    """How strongly all steps of all rounds are drawn back to where the federation started (L2), so that what was learnt
    before is forgotten less; 0: not at all."""
    aggregation: Aggregation = "fedavg"
    """What becomes of a round's updates: their mean as it is (``fedavg``), with momentum (``fedavgm``), through an
    adaptive optimizer (``fedadam``, ``fedyogi``, ``fedadagrad``), or with control variates in the silos' steps
    (``scaffold``); or a rule that withstands silos that lie (``median``, ``trimmed_mean``, ``krum``)."""
    server_learning_rate: Positive | None = None
    """Learning rate of the mean update; left out: 1, and 0.01 with the adaptive optimizers, which move every weight by
    about that much per round."""
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Share of the rounds' direction that is kept: momentum of ``fedavgm``, beta 1 of ``fedadam`` and ``fedyogi``."""
    server_second_moment_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Beta 2 of ``fedadam`` and ``fedyogi``."""
    server_tau: Positive = 1e-3
    """Tau of the adaptive optimizers: updates well below it are not scaled up."""
    byzantine_silos: Annotated[int, Field(ge=0)] = 0
    """Silos that may send anything: ``trimmed_mean`` leaves out that many values at each end of every coordinate,
    ``krum`` takes the update that is nearest to all but that many others."""
    max_silos: Count = 100
    """Most silos of ``median``, ``trimmed_mean`` and ``krum``, which hold all updates of a round at once."""
    train: Train = "lora"
    """What of the model trains and travels: LoRA adapters beside it (``lora``), all its parameters (``full``), the
    output head (``head``), or every bias (``bitfit``)."""
    adapter_targets: Literal["all-linear"] | LayerNames = "all-linear"
    """Layers with LoRA: ``all-linear``, the output head included unless it shares the embedding's weight; or names,
    ``["q_proj", "v_proj"]`` for instance."""
    base_dtype: BaseDtype = "float32"
    """What the weights beside LoRA adapters are kept and multiplied in; norms, biases and adapters are float32.
    ``bfloat16`` takes half their memory, and is slow on a processor without units for it."""
    update_dtype: UpdateDtype = "float32"
    """What silos' updates travel in: as they are, or rounded after their noise, so that epsilon is the same:
    ``bfloat16`` (half the bytes; each value is off by 0.4% of itself at most), ``int8`` (a quarter; by 0.4% of the
    largest in its array) or ``int4`` (an eighth; by 7.2% of the largest in its block). Older silos refuse the run."""
    update_block: Annotated[int, Field(ge=0, le=LARGEST_BLOCK)] = 0
    """With ``int8`` and ``int4``: how many values share one scale, 64 for instance; 0: with ``int8``, all of an
    array."""
    update_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of an update's values that travels: the largest. What is left out of it, by rounding too, stays at the silo
    and is added to its next update (error feedback). Only with records as units, and not under secure aggregation."""
    adapters: Literal["average", "ffa", "product"] = "average"
    """How adapters are averaged: A and B each by itself; A frozen, so that only B is trained and travels (FFA-LoRA); or
    their product, exactly, which is then factored again."""
    lora_rank: Count = 16
    """Rank of the adapters."""
    lora_ranks: CountBySilo = Field(default_factory=dict)
    """Smaller ranks for silos by name, with ``adapters = "product"``."""
    lora_alpha: Positive = 32
    """Scale of the adapters: the update is ``alpha / rank * B A``."""
    workers: Count = 2
    """Processes that host the silos of a simulation."""
    micro_batch_size: Count = 16
    """Most records processed at once inside a silo; speed only: no bit of an update under record-level DP changes."""
    clipping: ClippingMethod = "bookkeeping"
    """How per-record gradients are formed: book-keeping, or one of Opacus' modes; the same up to rounding."""
    min_silos: Count = 1
    """Silos that must answer for a round to count."""
    enough_silos: Annotated[int, Field(ge=0)] = 0
    """Number of replies with which a round ends before its deadline; 0: one from every silo that is there."""
    grace_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Seconds for which a round still waits for the others once ``enough_silos`` have answered."""
    required_silos: SiloNames = ()
    """Silos, by name, without whose update a round does not count: the run ends there, and the same command again asks
    for the same round."""
    run_lifetime_h: Positive = 720
    """Hours from a run's first start for which its requests are valid; a silo refuses them later."""
    round_timeout_s: Positive = 3600
    """Seconds after which a round goes on without those that have not answered."""
    deadlines_s: SecondsBySilo = Field(default_factory=dict)
    """The same for single silos, by name: shorter or longer than ``round_timeout_s``. What a silo that is too late has
    spent stays charged to its ledger, and its update is not added."""
    schedule: Schedule = "synchronous"
    """``synchronous``: a round ends when the silos have answered, and its updates are added together. ``buffered``: a
    silo that has answered gets the newest model at once, and whenever ``buffer`` updates have come the server takes a
    step (FedBuff); there are ``rounds`` steps, and a silo gives ``rounds`` updates at most."""
    buffer: Annotated[int, Field(ge=0)] = 0
    """With ``buffered``: number of updates that make a step of the server; 0 with ``synchronous``."""
    staleness_exponent: Annotated[float, Field(ge=0, le=10)] = 0.5
    """With ``buffered``: an update from a model of s steps ago counts ``(1 + s) ** -staleness_exponent``."""
    max_staleness: Annotated[int, Field(ge=0)] = 100
    """With ``buffered``: an update from a model of more steps ago than this is dropped; it stays charged."""
    secure_aggregation: bool = False
    """Whether the coordinator sees a round's updates as their sum alone: silos send them under masks that cancel. Each
    steward has to have confirmed the other silos' keys (`siloweave silo roster`). Older silos refuse such a run."""
    colluders: Annotated[int, Field(ge=0)] = 0
    """With ``secure_aggregation``: how many silos may be in league with the coordinator without it learning more than
    a sum. A round takes more than half of all silos and these, and ``min_silos`` at least; else nothing is unmasked."""
    state_dir: Annotated[str, Place("the simulated silos' keys and ledgers", made=True, lasting=True)] = ""
    """Folder of the simulated silos' keys and ledgers. It outlives runs, as a budget does. Empty: the same folder for
    all runs of a user, ``$XDG_STATE_HOME/siloweave/ledgers``, or ``~/.local/state/siloweave/ledgers``."""
    study: StudyName | Literal[""] = ""
    """Study in whose name silos are asked; empty: none, which silos with mandates refuse."""
    stages: tuple[RoundStage, ...] = ()
    """Stages of the fine-tuning, each a ``[[federated.stages]]`` of the file; none: all rounds are alike."""

    @model_validator(mode="after")
    def _consistent(self) -> "FederatedSettings":
        problems = (
            self._lora_problem(),
            self._rank_problem(),
            self._head_problem(),
            augmentation_problem("federated.augmentation", self.task, self.augmentation.largest),
            self._stages_problem(),
        )
        of_task = task_problems("federated", self.task, self.labels, self.template, self.pooling)
        of_rounds = (*schedule_problems(dict(self)), *secure_problems(dict(self)), *compression_problems(dict(self)))
        of_updates = (*self._unused(), *aggregation_problems(dict(self)))
        for problem in (*of_task, *of_updates, *problems, self._pull_problem(), *of_rounds):
            if problem:
                raise ValueError(problem)
        return self

    @property
    def task_spec(self) -> TaskSpec:
        """What a record is to the model, as requests say it."""
        return TaskSpec(name=self.task, labels=self.labels, template=self.template, pooling=self.pooling)

    @property
    def pull(self) -> float:
        """What a silo's steps are drawn back by to the adapter that they start from: FedProx's share, and the anchor's.

        The rest of the anchor's is the same in all steps of a round, and is sent as what they add.
        """
        return self.proximal_mu + self.anchor

    @property
    def compressed(self) -> bool:
        """Whether updates travel as the plan says, in few bytes, and not as arrays."""
        return bool(self.update_block) or self.update_share < 1

    @property
    def starts_as_base(self) -> bool:
        """Whether what travels before the first round changes nothing of the base model."""
        return self.train == "lora" and not self.continue_from

    @property
    def round_rules(self) -> dict[str, Any]:
        """When a round ends and what it needs to count, as plan and report say it: what departs from the defaults."""
        rules = {name: getattr(self, name) for name in (*ROUND_RULES, *SECURE_RULES)}
        return {
            name: value
            for name, value in rules.items()
            if name == "schedule" or value != type(self).model_fields[name].get_default(call_default_factory=True)
        }

    def deadline_s(self, silo: str) -> float:
        """Seconds after which a round goes on without a silo."""
        name = named_as(silo, self.deadlines_s)
        return self.round_timeout_s if name is None else self.deadlines_s[name]

    def missing(self, silos: Iterable[str]) -> list[str]:
        """The required silos that are not among these."""
        there = {named_as(silo, self.required_silos) for silo in silos}
        return sorted(set(self.required_silos) - there)

    def stage_of(self, round_number: int) -> RoundStage:
        """The stage of a round, which is counted from 1."""
        stages = self.stages or (RoundStage(rounds=self.rounds),)
        return stages[stage_at([stage.rounds for stage in stages], round_number - 1)[0]]

    def in_round(self, round_number: int) -> "FederatedSettings":
        """The settings with the learning rate of a round."""
        return self.model_copy(
            update={"learning_rate": self.stage_of(round_number).learning_rate or self.learning_rate}
        )

    def _stages_problem(self) -> str:
        rounds = sum(stage.rounds for stage in self.stages)
        if not self.stages or rounds == self.rounds:
            return ""
        return (
            f"federated.stages: their rounds add up to {rounds}, and federated.rounds is {self.rounds}; give "
            f"federated.rounds = {rounds}, or other stages"
        )

    def _head_problem(self) -> str:
        if self.train == "head" and self.pooling == "likelihood":
            return (
                "federated.train is 'head': with federated.pooling 'likelihood' there is no head for the labels; give "
                "'lora', 'full' or 'bitfit'"
            )
        if self.task_spec.in_words or self.adapters != "product":
            return ""
        return (
            f"federated.adapters is 'product': the head of the task {self.task!r} is no product of two factors; give "
            "'average' or 'ffa'"
        )

    def _unused(self) -> Iterator[str]:
        """A setting that nothing would read is a misunderstanding: nobody should believe in its effect."""
        for name, methods in _USED_BY.items():
            value, default = getattr(self, name), type(self).model_fields[name].default
            if self.aggregation not in methods and value != default:
                yield (
                    f"federated.{name} is {value}: federated.aggregation {self.aggregation!r} has no use for it; leave "
                    f"it out, or give one of {', '.join(methods)}"
                )

    def _pull_problem(self) -> str:
        rate = max([self.learning_rate, *(stage.learning_rate or 0 for stage in self.stages)])
        pull = self.pull * rate
        if pull <= 1:
            return ""
        given = f"federated.proximal_mu is {self.proximal_mu:g}"
        if self.anchor:
            given += f", federated.anchor {self.anchor:g}"
        return (
            f"{given} and federated.learning_rate {rate:g}: their product is {pull:g}, and a step of more than 1 "
            "overshoots the adapter that it is drawn back to; lower one"
        )

    def _lora_problem(self) -> str:
        if self.train == "lora":
            return ""
        for name in ("adapters", "adapter_targets", "base_dtype"):
            if getattr(self, name) != type(self).model_fields[name].default:
                return (
                    f"federated.{name} is {getattr(self, name)!r}: it is about LoRA, and federated.train is "
                    f"{self.train!r}; leave it out, or give federated.train = 'lora'"
                )
        return ""

    def _rank_problem(self) -> str:
        if self.lora_ranks and self.adapters != "product":
            return (
                f"federated.lora_ranks is {self.lora_ranks}: factors of different ranks have no mean; give "
                "federated.adapters = 'product', or leave it out"
            )
        large = {name: rank for name, rank in self.lora_ranks.items() if rank > self.lora_rank}
        if large:
            return f"federated.lora_ranks has {large}: give at most federated.lora_rank ({self.lora_rank})"
        return ""
