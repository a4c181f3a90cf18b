from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class Envelope(_message.Message):
    __slots__ = ("body", "receipt", "signature")
    BODY_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    body: bytes
    receipt: bytes
    signature: str
    def __init__(self, body: _Optional[bytes] = ..., receipt: _Optional[bytes] = ..., signature: _Optional[str] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("version", "run_id", "silo_id", "request_id", "coordinator", "expires", "study", "describe", "reserve", "train", "close", "evaluate", "contribute", "rehearse", "aggregate")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SILO_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    STUDY_FIELD_NUMBER: _ClassVar[int]
    DESCRIBE_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTE_FIELD_NUMBER: _ClassVar[int]
    REHEARSE_FIELD_NUMBER: _ClassVar[int]
    AGGREGATE_FIELD_NUMBER: _ClassVar[int]
    version: int
    run_id: str
    silo_id: str
    request_id: str
    coordinator: str
    expires: int
    study: str
    describe: Describe
    reserve: Reserve
    train: Train
    close: Close
    evaluate: Evaluate
    contribute: Contribute
    rehearse: Rehearse
    aggregate: Aggregate
    def __init__(self, version: _Optional[int] = ..., run_id: _Optional[str] = ..., silo_id: _Optional[str] = ..., request_id: _Optional[str] = ..., coordinator: _Optional[str] = ..., expires: _Optional[int] = ..., study: _Optional[str] = ..., describe: _Optional[_Union[Describe, _Mapping]] = ..., reserve: _Optional[_Union[Reserve, _Mapping]] = ..., train: _Optional[_Union[Train, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ..., evaluate: _Optional[_Union[Evaluate, _Mapping]] = ..., contribute: _Optional[_Union[Contribute, _Mapping]] = ..., rehearse: _Optional[_Union[Rehearse, _Mapping]] = ..., aggregate: _Optional[_Union[Aggregate, _Mapping]] = ...) -> None: ...

class Describe(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Reserve(_message.Message):
    __slots__ = ("plan", "request_bytes", "secure")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECURE_FIELD_NUMBER: _ClassVar[int]
    plan: str
    request_bytes: int
    secure: Secure
    def __init__(self, plan: _Optional[str] = ..., request_bytes: _Optional[int] = ..., secure: _Optional[_Union[Secure, _Mapping]] = ...) -> None: ...

class Train(_message.Message):
    __slots__ = ("round", "plan_digest", "base_model_digest", "task", "adapter_spec", "adapter", "learning_rate", "optimizer", "proximal_mu", "correction", "task_spec", "augmentation", "frozen_below", "frozen", "context_length", "update_dtype", "secure")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_SPEC_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    PROXIMAL_MU_FIELD_NUMBER: _ClassVar[int]
    CORRECTION_FIELD_NUMBER: _ClassVar[int]
    TASK_SPEC_FIELD_NUMBER: _ClassVar[int]
    AUGMENTATION_FIELD_NUMBER: _ClassVar[int]
    FROZEN_BELOW_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    UPDATE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    SECURE_FIELD_NUMBER: _ClassVar[int]
    round: int
    plan_digest: str
    base_model_digest: str
    task: str
    adapter_spec: AdapterSpec
    adapter: bytes
    learning_rate: float
    optimizer: str
    proximal_mu: float
    correction: bytes
    task_spec: TaskSpec
    augmentation: Augmentation
    frozen_below: int
    frozen: bytes
    context_length: int
    update_dtype: str
    secure: Secure
    def __init__(self, round: _Optional[int] = ..., plan_digest: _Optional[str] = ..., base_model_digest: _Optional[str] = ..., task: _Optional[str] = ..., adapter_spec: _Optional[_Union[AdapterSpec, _Mapping]] = ..., adapter: _Optional[bytes] = ..., learning_rate: _Optional[float] = ..., optimizer: _Optional[str] = ..., proximal_mu: _Optional[float] = ..., correction: _Optional[bytes] = ..., task_spec: _Optional[_Union[TaskSpec, _Mapping]] = ..., augmentation: _Optional[_Union[Augmentation, _Mapping]] = ..., frozen_below: _Optional[int] = ..., frozen: _Optional[bytes] = ..., context_length: _Optional[int] = ..., update_dtype: _Optional[str] = ..., secure: _Optional[_Union[Secure, _Mapping]] = ...) -> None: ...

class Secure(_message.Message):
    __slots__ = ("roster", "clip")
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    CLIP_FIELD_NUMBER: _ClassVar[int]
    roster: _containers.RepeatedCompositeFieldContainer[Member]
    clip: float
    def __init__(self, roster: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., clip: _Optional[float] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("silo", "public_key")
    SILO_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    silo: str
    public_key: str
    def __init__(self, silo: _Optional[str] = ..., public_key: _Optional[str] = ...) -> None: ...

class Aggregate(_message.Message):
    __slots__ = ("round", "phase", "message", "metric")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    round: int
    phase: int
    message: bytes
    metric: str
    def __init__(self, round: _Optional[int] = ..., phase: _Optional[int] = ..., message: _Optional[bytes] = ..., metric: _Optional[str] = ...) -> None: ...

class Augmentation(_message.Message):
    __slots__ = ("dropout", "swap", "mask")
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    SWAP_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    dropout: float
    swap: float
    mask: float
    def __init__(self, dropout: _Optional[float] = ..., swap: _Optional[float] = ..., mask: _Optional[float] = ...) -> None: ...

class Contribute(_message.Message):
    __slots__ = ("train", "local_steps", "sampling_rate")
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    LOCAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_RATE_FIELD_NUMBER: _ClassVar[int]
    train: Train
    local_steps: int
    sampling_rate: float
    def __init__(self, train: _Optional[_Union[Train, _Mapping]] = ..., local_steps: _Optional[int] = ..., sampling_rate: _Optional[float] = ...) -> None: ...

class TaskSpec(_message.Message):
    __slots__ = ("labels", "template", "pooling")
    LABELS_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    labels: _containers.RepeatedScalarFieldContainer[str]
    template: str
    pooling: str
    def __init__(self, labels: _Optional[_Iterable[str]] = ..., template: _Optional[str] = ..., pooling: _Optional[str] = ...) -> None: ...

class AdapterSpec(_message.Message):
    __slots__ = ("rank", "alpha", "frozen_digest", "frozen_seed", "train", "targets", "base_dtype")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    FROZEN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FROZEN_SEED_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    BASE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    alpha: float
    frozen_digest: str
    frozen_seed: int
    train: str
    targets: _containers.RepeatedScalarFieldContainer[str]
    base_dtype: str
    def __init__(self, rank: _Optional[int] = ..., alpha: _Optional[float] = ..., frozen_digest: _Optional[str] = ..., frozen_seed: _Optional[int] = ..., train: _Optional[str] = ..., targets: _Optional[_Iterable[str]] = ..., base_dtype: _Optional[str] = ...) -> None: ...

class Evaluate(_message.Message):
    __slots__ = ("number", "metric", "plan_digest", "base_model_digest", "task", "adapter_spec", "adapter", "task_spec", "secure")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_SPEC_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TASK_SPEC_FIELD_NUMBER: _ClassVar[int]
    SECURE_FIELD_NUMBER: _ClassVar[int]
    number: int
    metric: str
    plan_digest: str
    base_model_digest: str
    task: str
    adapter_spec: AdapterSpec
    adapter: bytes
    task_spec: TaskSpec
    secure: Secure
    def __init__(self, number: _Optional[int] = ..., metric: _Optional[str] = ..., plan_digest: _Optional[str] = ..., base_model_digest: _Optional[str] = ..., task: _Optional[str] = ..., adapter_spec: _Optional[_Union[AdapterSpec, _Mapping]] = ..., adapter: _Optional[bytes] = ..., task_spec: _Optional[_Union[TaskSpec, _Mapping]] = ..., secure: _Optional[_Union[Secure, _Mapping]] = ...) -> None: ...

class Rehearse(_message.Message):
    __slots__ = ("reserve", "train", "filler_bytes", "trial")
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    FILLER_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRIAL_FIELD_NUMBER: _ClassVar[int]
    reserve: Reserve
    train: Train
    filler_bytes: int
    trial: bool
    def __init__(self, reserve: _Optional[_Union[Reserve, _Mapping]] = ..., train: _Optional[_Union[Train, _Mapping]] = ..., filler_bytes: _Optional[int] = ..., trial: bool = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Reply(_message.Message):
    __slots__ = ("version", "silo_id", "request_digest", "described", "reserved", "trained", "closed", "refusal", "failure", "evaluated", "rehearsed", "aggregated")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SILO_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DESCRIBED_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    TRAINED_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    EVALUATED_FIELD_NUMBER: _ClassVar[int]
    REHEARSED_FIELD_NUMBER: _ClassVar[int]
    AGGREGATED_FIELD_NUMBER: _ClassVar[int]
    version: int
    silo_id: str
    request_digest: str
    described: Described
    reserved: Reserved
    trained: Trained
    closed: Closed
    refusal: Refusal
    failure: Failure
    evaluated: Evaluated
    rehearsed: Rehearsed
    aggregated: Aggregated
    def __init__(self, version: _Optional[int] = ..., silo_id: _Optional[str] = ..., request_digest: _Optional[str] = ..., described: _Optional[_Union[Described, _Mapping]] = ..., reserved: _Optional[_Union[Reserved, _Mapping]] = ..., trained: _Optional[_Union[Trained, _Mapping]] = ..., closed: _Optional[_Union[Closed, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., evaluated: _Optional[_Union[Evaluated, _Mapping]] = ..., rehearsed: _Optional[_Union[Rehearsed, _Mapping]] = ..., aggregated: _Optional[_Union[Aggregated, _Mapping]] = ...) -> None: ...

class Described(_message.Message):
    __slots__ = ("dataset_id", "public_key", "public_record_count")
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_RECORD_COUNT_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    public_key: str
    public_record_count: int
    def __init__(self, dataset_id: _Optional[str] = ..., public_key: _Optional[str] = ..., public_record_count: _Optional[int] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("receipt", "mandate")
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    MANDATE_FIELD_NUMBER: _ClassVar[int]
    receipt: bytes
    mandate: bytes
    def __init__(self, receipt: _Optional[bytes] = ..., mandate: _Optional[bytes] = ...) -> None: ...

class Trained(_message.Message):
    __slots__ = ("receipt", "update", "keys")
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    receipt: bytes
    update: bytes
    keys: bytes
    def __init__(self, receipt: _Optional[bytes] = ..., update: _Optional[bytes] = ..., keys: _Optional[bytes] = ...) -> None: ...

class Aggregated(_message.Message):
    __slots__ = ("message",)
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    message: bytes
    def __init__(self, message: _Optional[bytes] = ...) -> None: ...

class Evaluated(_message.Message):
    __slots__ = ("receipt", "sums", "keys")
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    receipt: bytes
    sums: _containers.RepeatedScalarFieldContainer[float]
    keys: bytes
    def __init__(self, receipt: _Optional[bytes] = ..., sums: _Optional[_Iterable[float]] = ..., keys: _Optional[bytes] = ...) -> None: ...

class Closed(_message.Message):
    __slots__ = ("receipt", "statement")
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    STATEMENT_FIELD_NUMBER: _ClassVar[int]
    receipt: bytes
    statement: bytes
    def __init__(self, receipt: _Optional[bytes] = ..., statement: _Optional[bytes] = ...) -> None: ...

class Rehearsed(_message.Message):
    __slots__ = ("clock", "version", "base_model_digest", "task", "task_spec", "columns", "room", "refusals", "trial", "seconds", "filler")
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    TASK_SPEC_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    ROOM_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    TRIAL_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    FILLER_FIELD_NUMBER: _ClassVar[int]
    clock: float
    version: str
    base_model_digest: str
    task: str
    task_spec: TaskSpec
    columns: _containers.RepeatedScalarFieldContainer[str]
    room: bool
    refusals: _containers.RepeatedScalarFieldContainer[str]
    trial: Trial
    seconds: float
    filler: bytes
    def __init__(self, clock: _Optional[float] = ..., version: _Optional[str] = ..., base_model_digest: _Optional[str] = ..., task: _Optional[str] = ..., task_spec: _Optional[_Union[TaskSpec, _Mapping]] = ..., columns: _Optional[_Iterable[str]] = ..., room: bool = ..., refusals: _Optional[_Iterable[str]] = ..., trial: _Optional[_Union[Trial, _Mapping]] = ..., seconds: _Optional[float] = ..., filler: _Optional[bytes] = ...) -> None: ...

class Trial(_message.Message):
    __slots__ = ("outcome", "records", "prepare_seconds", "step_seconds", "first_seconds")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    PREPARE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_SECONDS_FIELD_NUMBER: _ClassVar[int]
    outcome: str
    records: int
    prepare_seconds: float
    step_seconds: float
    first_seconds: float
    def __init__(self, outcome: _Optional[str] = ..., records: _Optional[int] = ..., prepare_seconds: _Optional[float] = ..., step_seconds: _Optional[float] = ..., first_seconds: _Optional[float] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("rule", "asked", "allowed", "message")
    RULE_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    rule: str
    asked: str
    allowed: str
    message: str
    def __init__(self, rule: _Optional[str] = ..., asked: _Optional[str] = ..., allowed: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code",)
    CODE_FIELD_NUMBER: _ClassVar[int]
    code: str
    def __init__(self, code: _Optional[str] = ...) -> None: ...
