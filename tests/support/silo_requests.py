"""A coordinator's signed requests to one silo, for tests."""

import json
import tempfile
from contextlib import contextmanager
from pathlib import Path

import tomli_w

from configs.schema.silo import SiloConfig
from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import reply_holds, seal_request
from federated.protocol.framing import PROTOCOL_VERSION
from privacy.signing import Signer

EXPIRES = 2**32  # in 2106: a request has the same bytes in every session, and with an injected seed the same draws


def signer_of(secret):
    """A signer whose key is this secret."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "key")
        path.write_bytes(secret)
        path.chmod(0o600)
        return Signer(path)


def ward(folder, model, rows=60, **policy):
    """Settings of a silo with so many short notes in a folder."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"note {i} of the ward"}) + "\n" for i in range(rows)))
    return SiloConfig(
        silo={
            "id": "north",
            "dataset_id": "ward",
            "state_dir": str(folder / "state"),
            "base_model": str(model),
            "public_record_count": 100,
        },
        data={"source": str(data)},
        policy={"budget_epsilon": 20.0, "budget_delta": 1e-4, "max_epsilon_per_run": 10.0, **policy},
    )


@contextmanager
def acquainted(folder, model, names, seed=None, **policy):
    """Silos of such wards by name, and their keys, which all of them know."""
    from federated.silo.silo import Silo  # which imports torch, and not all who ask silos do

    roster, silos = {}, {}
    for name in names:
        (folder / name).mkdir()
        config = ward(folder / name, model, **policy)
        config = config.model_copy(update={"silo": config.silo.model_copy(update={"id": name})})
        silos[name] = Silo(config, TRUSTED, seed, roster=roster)
        roster[name] = silos[name].ledger.public_key
    yield silos, roster
    for silo in silos.values():
        silo.close()


def silo_toml(folder, name="north", **policy):
    """The file ``silo.toml`` of a silo whose records and base model are not there yet."""
    places = {one: str(folder / one) for one in ("state", "model", "data.jsonl")}
    silo = {"id": name, "dataset_id": "ward", "state_dir": places["state"], "base_model": places["model"]}
    tree = {
        "silo": {**silo, "public_record_count": 100},
        "data": {"source": places["data.jsonl"]},
        "policy": {"budget_epsilon": 20.0, "budget_delta": 1e-4, **policy},
    }
    path = folder / "silo.toml"
    path.write_text(tomli_w.dumps(tree))
    return path


COORDINATOR = signer_of(bytes(range(32)))
TRUSTED = frozenset({COORDINATOR.public_key})


def body_of(request_id, run_id="run-1", silo_id="north", **fields):
    """A request's bytes."""
    given = {
        "version": PROTOCOL_VERSION,
        "run_id": run_id,
        "silo_id": silo_id,
        "request_id": request_id,
        "coordinator": COORDINATOR.public_key,
        "expires": EXPIRES,
    }
    return pb.Request(**{**given, **fields}).SerializeToString(deterministic=True)


def opened(content, silo=None):
    """The reply in an envelope, whose signature holds where the silo is given."""
    envelope = pb.Envelope.FromString(content)
    if silo is not None:
        assert reply_holds(envelope, silo.ledger.public_key)
    return pb.Reply.FromString(envelope.body)


def ask(silo, request_id, receipt=b"", **fields):
    """Asks a silo in this process; returns its reply and the request's bytes."""
    body = body_of(request_id, **fields)
    return opened(silo.handle(seal_request(COORDINATOR, body, receipt)), silo), body
