"""A silo of public data alone: no ledger, no charge, no noise."""

from configs.errors import PolicyRefusal
from configs.schema.silo import SiloConfig
from configs.storage.files import digest_bytes
from federated.adapters.arrays import from_bytes, to_bytes
from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import seal_reply
from federated.protocol.framing import PROTOCOL_VERSION
from federated.silo.local_training import public_update
from federated.silo.requests import check_sender, decode, open_envelope
from federated.silo.silo import Silo
from privacy.mechanism.streams import Streams
from privacy.plan import PlanRequest


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
