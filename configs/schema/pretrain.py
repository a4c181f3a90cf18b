"""Settings of the base model, its pretraining, and the gang of ranks that does it."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.schema.base import Count, Positive, Settings
from configs.schema.places import Place
from configs.schema.stages import TrainingStage

Family = Literal["llama", "gpt2", "bert", "t5", "rnn", "lstm", "gru"]
RECURRENT = ("rnn", "lstm", "gru")
Objective = Literal["causal", "masked", "next_sentence", "span_corruption"]
# What each family can be pretrained on; the first is its own.
OBJECTIVES: dict[Family, tuple[Objective, ...]] = {
    "llama": ("causal",),
    "gpt2": ("causal",),
    "bert": ("masked", "next_sentence"),
    "t5": ("span_corruption",),
    "rnn": ("causal",),
    "lstm": ("causal",),
    "gru": ("causal",),
}
ANY_MODEL: tuple[Objective, ...] = ("causal", "masked", "span_corruption")
"""What a model of ``model.config`` can be pretrained on, as far as it has the head for it; the first where none is
named."""


class ModelSettings(Settings):
    """The base model: one that is pretrained from a random start, or one that others have made."""

    source: Annotated[str, Place("the base model", unless="(embedded|hf):.*", prefix="gguf:")] = ""
    """A model that others have made, instead of pretraining: the folder of a Hugging Face causal language model,
    ``hf:ORG/NAME@REVISION``, ``gguf:FILE`` (extra ``gguf``) or ``embedded:smollm2`` (extra ``models``). It has widths
    and layers of its own, so ``hidden_size``, ``layers``, ``heads`` and ``intermediate_size`` are not read. With it you
    declare, signed by the key in ``federated.state_dir``, that public text alone has made it. Empty: pretrain."""
    family: Family = "llama"
    """Architecture of the model that is pretrained: decoder (``llama``, ``gpt2``), encoder (``bert``), encoder-decoder
    (``t5``) or recurrent (``rnn``, ``lstm``, ``gru``). Not read with ``source`` or ``config``."""
    config: Annotated[str, Place("the model's configuration")] = ""
    """A Hugging Face ``config.json``: any other architecture that the installed transformers knows, with random
    weights. Vocabulary, special tokens and dropout are the run's; ``hidden_size``, ``layers``, ``heads`` and
    ``intermediate_size`` are not read. Empty: ``family``."""
    hidden_size: Count = 128
    """Width of the residual stream."""
    layers: Count = 4
    """Number of blocks; of ``t5``, of encoder and decoder each."""
    heads: Count = 4
    """Attention heads of a block; divides ``hidden_size``. A recurrent model has none."""
    intermediate_size: Count = 384
    """Width of the feed-forward layer, which is gated in ``llama`` and ``t5``. A recurrent model has none."""
    context_length: Annotated[int, Field(ge=8)] = 128
    """Longest sequence, in tokens; with ``source`` or ``config``, at most the model's own. A longer private record is
    truncated."""

    @property
    def made_by(self) -> str:
        """The command that makes the run's base model."""
        return "import" if self.source else "export"

    @model_validator(mode="after")
    def _one_architecture(self) -> "ModelSettings":
        if self.config and (self.source or self.family != "llama"):
            other = f"model.source {self.source!r}" if self.source else f"model.family {self.family!r}"
            raise ValueError(
                f"model.config is {self.config!r}: it is the architecture, and so is {other}; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelSettings":
        width, rest = divmod(self.hidden_size, self.heads)
        if self.family == "llama" and (rest or width % 2):
            raise ValueError(
                f"model.heads is {self.heads}: model.hidden_size {self.hidden_size} must be an even multiple of it "
                "(rotary embeddings pair the dimensions)"
            )
        if self.family not in RECURRENT and rest:
            raise ValueError(
                f"model.heads is {self.heads}: model.hidden_size {self.hidden_size} must be a multiple of it"
            )
        return self


class PretrainSettings(Settings):
    """Pretraining on public text."""

    objective: Literal["auto", Objective] = "auto"
    """What is minimised: the next token (``causal``), masked words (``masked``, with ``next_sentence`` whether two
    texts belong together as well; ``bert``), or spans that are cut out (``span_corruption``; ``t5``). ``auto``: the
    family's own, and ``causal`` with ``model.config``."""
    steps: Count = 600
    """Optimizer steps."""
    batch_size: Count = 8
    """Sequences per step, over all ranks."""
    micro_batch_size: Count = 4
    """Sequences that a rank processes at once; gradients of the others are accumulated."""
    optimizer: Literal["adamw", "adam", "sgd", "momentum"] = "adamw"
    """Torch's own: ``adam`` couples weight decay to the gradient (L2), ``momentum`` is SGD with momentum ``beta1``."""
    learning_rate: Positive = 3e-3
    """Peak learning rate."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment, or of ``momentum``; sgd has none."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment (adamw, adam)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Weight decay of matrices, embeddings and head included; vectors (norms, biases) have none."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up; ``wsd`` stays at the peak, then decays linearly over ``decay_share`` of all
    steps."""
    warmup_steps: Annotated[int, Field(ge=0)] = 30
    """Steps of linear warm-up before the schedule."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of all steps in which ``wsd`` decays."""
    min_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Final learning rate as a share of the peak; ``constant`` stays at the peak."""
    max_grad_norm: Positive = 1.0
    """Global gradient norm is clipped to this (optimization, not privacy)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout while pretraining, wherever the family has any (a Llama: on attention weights alone). The loss curve then
    depends on the number of ranks; the exported model has none."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """DeepSpeed ZeRO stage."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of forward and backward; master weights stay float32. fp16 needs GPUs."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where master weights and optimizer state live instead of the device: ``cpu`` from ZeRO stage 1 on, ``nvme`` at
    stage 3."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where a rank's share of the weights lives instead of the device, at ZeRO stage 3."""
    offload_folder: Annotated[str, Place("what is offloaded", made=True)] = ""
    """Folder on a local disk of every node for ``nvme``; empty without it."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more work."""
    torch_compile: bool = False
    """Compile the model with torch.compile: a slower start for faster steps; needs a C++ compiler, and ZeRO below 3."""
    commit_every: Count = 100
    """Steps between committed checkpoints."""
    keep_commits: Annotated[int, Field(ge=2)] = 2
    """Committed checkpoints kept; two at least, so that there is one before a damaged newest one."""
    validate_every: Count = 200
    """Steps between validations."""
    spike_ratio: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    """A loss above this multiple of the median of the last 32 steps' is a spike: training goes back to the last commit
    and skips the data since then, as it does where something is not finite. 0: spikes are not looked for."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 3
    """How often a run may roll back before it ends with the cause."""
    stages: tuple[TrainingStage, ...] = ()
    """Stages of the training, each a ``[[pretrain.stages]]`` of the file; none: all steps are alike."""

    @model_validator(mode="after")
    def _spikes_are_above(self) -> "PretrainSettings":
        if 0 < self.spike_ratio <= 1:
            raise ValueError(
                f"pretrain.spike_ratio is {self.spike_ratio:g}: give more than 1 (2 is twice the median), or 0 for none"
            )
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> "PretrainSettings":
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"pretrain.warmup_steps is {self.warmup_steps}: give less than pretrain.steps ({self.steps})"
            )
        if self.schedule == "wsd" and self.warmup_steps + self.decay_share * self.steps > self.steps:
            raise ValueError(
                f"pretrain.decay_share is {self.decay_share:g}: the decay and pretrain.warmup_steps "
                f"({self.warmup_steps}) don't fit into pretrain.steps ({self.steps}); lower one of them"
            )
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> "PretrainSettings":
        steps = sum(stage.steps for stage in self.stages)
        if self.stages and steps != self.steps:
            raise ValueError(
                f"pretrain.stages: their steps add up to {steps}, and pretrain.steps is {self.steps}; give "
                f"pretrain.steps = {steps}, or other stages"
            )
        for number, stage in enumerate(self.stages):
            if stage.learning_rate and self.warmup_steps >= stage.steps:
                raise ValueError(
                    f"pretrain.stages.{number}.steps is {stage.steps}: a stage with a learning_rate of its own warms "
                    f"up for pretrain.warmup_steps ({self.warmup_steps}); give more steps, or a shorter warm-up"
                )
        return self

    @model_validator(mode="after")
    def _offload_fits(self) -> "PretrainSettings":
        places = {"offload_optimizer": self.offload_optimizer, "offload_parameters": self.offload_parameters}
        for name, place in places.items():
            least = 3 if name == "offload_parameters" or place == "nvme" else 1
            if place != "none" and self.zero_stage < least:
                raise ValueError(
                    f"pretrain.{name} is {place!r}: needs pretrain.zero_stage {least} or more, and it is "
                    f"{self.zero_stage}"
                )
        if ("nvme" in places.values()) != bool(self.offload_folder):
            raise ValueError(
                f"pretrain.offload_folder is {self.offload_folder!r}: give a folder on a local disk with offload to "
                "'nvme', and none without"
            )
        return self

    @model_validator(mode="after")
    def _compile_fits(self) -> "PretrainSettings":
        if self.torch_compile and self.zero_stage == 3:
            raise ValueError(
                "pretrain.torch_compile is true: ZeRO 3 gathers weights inside the forward pass, where compiled code "
                "would be cut at every layer; give pretrain.zero_stage 2, or false"
            )
        return self


class ClusterSettings(Settings):
    """The gang of Ray actors; one actor is one rank."""

    world_size: Count = 2
    """Number of ranks; with ``min_world_size``, the largest number."""
    min_world_size: Annotated[int, Field(ge=0)] = 0
    """Fewest ranks to train with: where the cluster lacks room for ``world_size``, a start takes as many as it has room
    for and ``pretrain.batch_size`` can be shared among. 0: ``world_size``, never fewer."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """``auto`` takes one GPU per rank where Ray has enough of them, and CPUs otherwise."""
    address: str = ""
    """Ray cluster to join; empty: RAY_ADDRESS, else a Ray of our own on this machine."""
    threads_per_rank: Count = 1
    """Torch threads of a rank or of a silo worker, and CPUs that are reserved for it."""
    max_failures: Annotated[int, Field(ge=0)] = 1
    """Restarts from the last commit after a rank failed, before the run ends with the first cause."""
    standbys: bool = True
    """Keep a warm process for every rank, which takes its place when any rank fails: a restart in about a second. Costs
    about 520 MB of memory per rank, and some seconds of CPU after the first step and after every restart."""
    hang_timeout_s: Positive = 300
    """Seconds without a new phase (data, forward, backward, step, commit, ...) after which a rank counts as failed;
    more than the slowest phase takes. A rank that waits for its commit's copy counts as failed only once no part of it
    has arrived for so long: parts are 1 MiB in a folder, 50 MiB in S3, whole files where a store reports no parts."""
    scratch_dir: Annotated[str, Place("checkpoints on their way", made=True)] = ""
    """Folder of each node where its ranks write a checkpoint before it is copied to ``run.storage`` in the background,
    and where one from an object store is fetched to: room for two checkpoints; empty: below TMPDIR."""
    placement_timeout_s: Positive = 60
    """Seconds to wait for the cluster to have room for the gang; the first start waits that long for ``world_size``
    ranks before it takes fewer."""

    @model_validator(mode="after")
    def _range(self) -> "ClusterSettings":
        if self.min_world_size > self.world_size:
            raise ValueError(
                f"cluster.min_world_size is {self.min_world_size}: give at most cluster.world_size ({self.world_size})"
            )
        return self
