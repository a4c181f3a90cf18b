"""How long each text, content and list of a message may be: one table, looked at before anything of it is used.

What a message says is short, but for a receipt; what it carries (adapters, updates) is bounded by the message around
it, which a silo bounds as a whole.
"""

from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from configs.schema.federated import MOST_TARGETS
from privacy.ledger.statements import LARGEST_STATEMENT_BYTES

NAME, DIGEST, REQUEST_ID, SIGNATURE = 100, 64, 200, 128
DATASET = 255
PLAN = 10_000
TEXT = 3000  # of a refusal's message, as silos have cut it since their first version
SUMS = 1000
LABELS, TEMPLATE = 300, 2000
COLUMNS, REFUSALS = 100, 100
KEYS, MOST_SILOS = 1000, 10_000
WHOLE = 2**31 - 1  # protobuf's own bound

LARGEST = {  # characters of a string, bytes of bytes, entries of a list
    "Chunk.data": WHOLE,
    "Envelope.body": WHOLE,
    "Envelope.receipt": LARGEST_STATEMENT_BYTES,
    "Envelope.signature": SIGNATURE,
    "Request.run_id": NAME,
    "Request.silo_id": NAME,
    "Request.request_id": REQUEST_ID,
    "Request.coordinator": DIGEST,
    "Request.study": NAME,
    "Reserve.plan": PLAN,
    "Train.plan_digest": DIGEST,
    "Train.base_model_digest": DIGEST,
    "Train.task": NAME,
    "Train.adapter": WHOLE,
    "Train.optimizer": NAME,
    "Train.correction": WHOLE,
    "Train.frozen": WHOLE,
    "Train.update_dtype": NAME,
    "Secure.roster": MOST_SILOS,
    "Member.silo": NAME,
    "Member.public_key": DIGEST,
    "Aggregate.message": WHOLE,
    "Aggregate.metric": NAME,
    "TaskSpec.labels": LABELS,
    "TaskSpec.template": TEMPLATE,
    "TaskSpec.pooling": NAME,
    "AdapterSpec.frozen_digest": DIGEST,
    "AdapterSpec.train": NAME,
    "AdapterSpec.targets": MOST_TARGETS,
    "AdapterSpec.base_dtype": NAME,
    "Evaluate.metric": NAME,
    "Evaluate.plan_digest": DIGEST,
    "Evaluate.base_model_digest": DIGEST,
    "Evaluate.task": NAME,
    "Evaluate.adapter": WHOLE,
    "Reply.silo_id": NAME,
    "Reply.request_digest": DIGEST,
    "Described.dataset_id": DATASET,
    "Described.public_key": DIGEST,
    "Reserved.receipt": LARGEST_STATEMENT_BYTES,
    "Reserved.mandate": LARGEST_STATEMENT_BYTES,
    "Trained.receipt": LARGEST_STATEMENT_BYTES,
    "Trained.update": WHOLE,
    "Trained.keys": KEYS,
    "Aggregated.message": WHOLE,
    "Evaluated.receipt": LARGEST_STATEMENT_BYTES,
    "Evaluated.sums": SUMS,
    "Evaluated.keys": KEYS,
    "Closed.receipt": LARGEST_STATEMENT_BYTES,
    "Closed.statement": LARGEST_STATEMENT_BYTES,
    "Refusal.rule": NAME,
    "Refusal.asked": TEXT,
    "Refusal.allowed": TEXT,
    "Refusal.message": TEXT,
    "Failure.code": NAME,
    "Rehearsed.version": NAME,
    "Rehearsed.base_model_digest": DIGEST,
    "Rehearsed.task": NAME,
    "Rehearsed.columns": COLUMNS,
    "Rehearsed.refusals": REFUSALS,
    "Rehearsed.filler": WHOLE,
    "Trial.outcome": NAME,
}


def excess(message: Any) -> tuple[str, str, str] | None:
    """The first field of a message, or of one inside it, that is too long.

    Returns:
        Its name, its length, and what is allowed; None where all are short enough.
    """
    for field, value in message.ListFields():
        if has_length(field) and len(value) > (most := LARGEST[f"{message.DESCRIPTOR.name}.{field.name}"]):
            return field.name, f"{len(value)} {_unit(field)}", f"at most {most}"
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            inside = (excess(one) for one in (value if field.is_repeated else (value,)))
            if found := next((one for one in inside if one is not None), None):
                return found
    return None


def has_length(field: FieldDescriptor) -> bool:
    """Whether a field's value is as long as its sender likes."""
    return field.is_repeated or field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


def _unit(field: FieldDescriptor) -> str:
    if field.is_repeated:
        return "entries"
    return "characters" if field.type == FieldDescriptor.TYPE_STRING else "bytes"
