from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar

from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message

DESCRIPTOR: _descriptor.FileDescriptor

class Envelope(_message.Message):
    __slots__ = ("body",)
    BODY_FIELD_NUMBER: _ClassVar[int]
    body: bytes
    def __init__(self, body: bytes | None = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("close", "describe", "request_id", "reserve", "run_id", "silo_id", "train", "version")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SILO_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    DESCRIBE_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    version: int
    run_id: str
    silo_id: str
    request_id: str
    describe: Describe
    reserve: Reserve
    train: Train
    close: Close
    def __init__(
        self,
        version: int | None = ...,
        run_id: str | None = ...,
        silo_id: str | None = ...,
        request_id: str | None = ...,
        describe: Describe | _Mapping | None = ...,
        reserve: Reserve | _Mapping | None = ...,
        train: Train | _Mapping | None = ...,
        close: Close | _Mapping | None = ...,
    ) -> None: ...

class Describe(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Reserve(_message.Message):
    __slots__ = ("plan",)
    PLAN_FIELD_NUMBER: _ClassVar[int]
    plan: str
    def __init__(self, plan: str | None = ...) -> None: ...

class Train(_message.Message):
    __slots__ = ("adapter", "adapter_spec", "base_model_digest", "learning_rate", "plan_digest", "round", "task")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_SPEC_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    round: int
    plan_digest: str
    base_model_digest: str
    task: str
    adapter_spec: AdapterSpec
    adapter: bytes
    learning_rate: float
    def __init__(
        self,
        round: int | None = ...,
        plan_digest: str | None = ...,
        base_model_digest: str | None = ...,
        task: str | None = ...,
        adapter_spec: AdapterSpec | _Mapping | None = ...,
        adapter: bytes | None = ...,
        learning_rate: float | None = ...,
    ) -> None: ...

class AdapterSpec(_message.Message):
    __slots__ = ("alpha", "rank")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    rank: int
    alpha: float
    def __init__(self, rank: int | None = ..., alpha: float | None = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Reply(_message.Message):
    __slots__ = (
        "closed",
        "described",
        "failure",
        "refusal",
        "request_digest",
        "reserved",
        "silo_id",
        "trained",
        "version",
    )
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SILO_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DESCRIBED_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    TRAINED_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    version: int
    silo_id: str
    request_digest: str
    described: Described
    reserved: Reserved
    trained: Trained
    closed: Closed
    refusal: Refusal
    failure: Failure
    def __init__(
        self,
        version: int | None = ...,
        silo_id: str | None = ...,
        request_digest: str | None = ...,
        described: Described | _Mapping | None = ...,
        reserved: Reserved | _Mapping | None = ...,
        trained: Trained | _Mapping | None = ...,
        closed: Closed | _Mapping | None = ...,
        refusal: Refusal | _Mapping | None = ...,
        failure: Failure | _Mapping | None = ...,
    ) -> None: ...

class Described(_message.Message):
    __slots__ = ("dataset_id", "public_key", "public_record_count")
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_RECORD_COUNT_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    public_key: str
    public_record_count: int
    def __init__(
        self,
        dataset_id: str | None = ...,
        public_key: str | None = ...,
        public_record_count: int | None = ...,
    ) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("receipt",)
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    receipt: Receipt
    def __init__(self, receipt: Receipt | _Mapping | None = ...) -> None: ...

class Trained(_message.Message):
    __slots__ = ("receipt", "update")
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    receipt: Receipt
    update: bytes
    def __init__(self, receipt: Receipt | _Mapping | None = ..., update: bytes | None = ...) -> None: ...

class Closed(_message.Message):
    __slots__ = ("receipt",)
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    receipt: Receipt
    def __init__(self, receipt: Receipt | _Mapping | None = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("allowed", "asked", "message", "rule")
    RULE_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    rule: str
    asked: str
    allowed: str
    message: str
    def __init__(
        self,
        rule: str | None = ...,
        asked: str | None = ...,
        allowed: str | None = ...,
        message: str | None = ...,
    ) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code",)
    CODE_FIELD_NUMBER: _ClassVar[int]
    code: str
    def __init__(self, code: str | None = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("delta_left", "epsilon_left", "epsilon_reserved", "head", "number")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    EPSILON_RESERVED_FIELD_NUMBER: _ClassVar[int]
    EPSILON_LEFT_FIELD_NUMBER: _ClassVar[int]
    DELTA_LEFT_FIELD_NUMBER: _ClassVar[int]
    number: int
    head: str
    epsilon_reserved: float
    epsilon_left: float
    delta_left: float
    def __init__(
        self,
        number: int | None = ...,
        head: str | None = ...,
        epsilon_reserved: float | None = ...,
        epsilon_left: float | None = ...,
        delta_left: float | None = ...,
    ) -> None: ...
