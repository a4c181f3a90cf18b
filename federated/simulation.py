"""The silos of a simulation on one machine, and what only a simulation may do: read public silos in the clear."""

from functools import partial
from pathlib import Path
from typing import Any

from configs.artifacts import digest_bytes
from configs.errors import InputError, PolicyRefusal
from configs.events import Listener
from configs.schema import RunConfig
from configs.silo import SiloConfig, simulated_silo
from federated import silo_pb2 as pb
from federated.adapters import from_bytes, to_bytes
from federated.aggregator import open_ledger, simulated_ledger
from federated.envelope import seal_reply
from federated.exchange import Parties
from federated.local_grid import LocalGrid, OpenSilo
from federated.local_training import public_update
from federated.planning import plan_request
from federated.protocol import PROTOCOL_VERSION
from federated.requests import check_sender, decode, open_envelope
from federated.server_app import run_federation
from federated.silo import Silo
from federated.silo_data import rows_of
from federated.trust import coordinator_signer
from privacy.certificate import AGGREGATOR
from privacy.plan import PlanRequest
from privacy.streams import Streams, injected_seeds


def simulated_silos(config: RunConfig, base_model: Path) -> dict[str, SiloConfig]:
    """The simulated silos by name, from the data's silo column; paths are absolute, so that any process can open them.

    Raises:
        InputError: a silo with a declared size or a rank of its own has no record, or there is no silo at all.
    """
    probe = simulated_silo(config, "probe", base_model)
    rows, _ = rows_of(probe.data)
    missing = sorted(set(config.data.private.public_record_counts) - set(rows))
    if missing or not rows:
        raise InputError(
            f"data.private.source {config.data.private.source!r}: no record for silo {missing or 'at all'} (there are "
            f"{', '.join(sorted(rows)) or 'none'}); check data.private.silo and data.private.public_record_counts"
        )
    unknown = sorted(set(config.federated.lora_ranks) - set(rows))
    if unknown:
        raise InputError(f"federated.lora_ranks has {unknown}: there are {', '.join(sorted(rows))}; check the names")
    return {name: simulated_silo(config, name, base_model) for name in sorted(rows)}


def simulate(
    ray: Any,
    config: RunConfig,
    base_model: Path,
    directory: Path,
    *,
    on_event: Listener,
    with_dp: bool = True,
    injected_seed: bytes | None = None,
) -> None:
    """Runs the federation of the settings over the local grid, to the end, from its newest commit.

    Args:
        ray: a running Ray.
        config: the run's settings.
        base_model: exported model directory.
        directory: the federation's own directory.
        on_event: receives the coordinator's events.
        with_dp: False runs the comparison without DP, for data declared public only.
        injected_seed: for tests: makes the silos' noise repeatable.
    """
    silos = simulated_silos(config, base_model)
    home = Path(config.federated.state_dir)
    signer = coordinator_signer(home)
    trusted = frozenset({signer.public_key})
    if with_dp:
        opener: OpenSilo = partial(_open_silo, silos, trusted, injected_seed)
    else:
        opener = partial(_open_comparison, silos, trusted, plan_request(config))
    ledger = partial(
        open_ledger,
        home,
        simulated_ledger(config),
        config.data.private.dataset_id,
        config.privacy,
        injected_seeds(injected_seed, AGGREGATOR),
    )
    parties = Parties(signer, len(silos), open_ledger=ledger)
    with LocalGrid(ray, opener, silos, config.federated.workers, config.cluster.threads_per_rank) as grid:
        run_federation(grid, config, base_model, directory, parties, on_event, certify=with_dp)


def _open_silo(silos: dict[str, SiloConfig], trusted: frozenset[str], injected_seed: bytes | None, name: str) -> Silo:
    return Silo(silos[name], trusted, injected_seed)


def _open_comparison(
    silos: dict[str, SiloConfig], trusted: frozenset[str], plan: PlanRequest, name: str
) -> "PublicSilo":
    return PublicSilo(silos[name], trusted, plan)


class PublicSilo:
    """Trains without clipping and noise, to show what privacy costs. Exists only for data declared public.

    Raises:
        PolicyRefusal: the data is not declared public.
    """

    def __init__(self, config: SiloConfig, trusted: frozenset[str], plan: PlanRequest) -> None:
        if not config.data.public:
            raise PolicyRefusal(
                f"silo {config.silo.id!r}: training without DP needs data declared public = true",
                rule="public",
                asked="no DP",
                allowed="data declared public",
            )
        self._silo = Silo(config, trusted)  # for its data and model; its ledger is neither charged nor asked
        self._plan = plan.bind(config.silo.public_record_count)  # for its batches

    def close(self) -> None:
        """Closes the silo's files."""
        self._silo.close()

    def handle(self, content: bytes) -> bytes:
        """Answers like a silo, without receipts."""
        silo = self._silo
        envelope = open_envelope(content, silo.config.policy.max_request_bytes)
        digest = digest_bytes(envelope.body)
        request = decode(envelope.body, silo.config.silo.id)
        check_sender(envelope, request, silo.trusted())
        kind = request.WhichOneof("kind")
        reply = pb.Reply(version=PROTOCOL_VERSION, silo_id=silo.config.silo.id, request_digest=digest)
        if kind == "describe":
            reply.described.CopyFrom(silo.describe())
        elif kind == "reserve":
            reply.reserved.SetInParent()
        elif kind == "close":
            reply.closed.SetInParent()
        else:
            reply.trained.update = self._update(request.train, digest)
        return seal_reply(silo.ledger.journal.signer, reply.SerializeToString(deterministic=True))

    def _update(self, train: pb.Train, digest: str) -> bytes:
        silo = self._silo
        streams = Streams(bytes(32), digest)  # nothing here is private, so the batches may be predictable
        model, settings = silo.model(train), silo.local_settings(train)
        return to_bytes(
            public_update(self._plan, streams, model, silo.task, from_bytes(train.adapter), silo.records, settings)
        )
