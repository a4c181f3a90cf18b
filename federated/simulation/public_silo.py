"""A silo of public data alone: no ledger, no charge, no noise."""

from pathlib import Path

from configs.errors import InputError, PolicyRefusal
from configs.schema.silo import SiloConfig
from configs.storage.files import digest_bytes, private_folder
from configs.storage.layout import SiloFiles
from configs.storage.secrets import load_secret
from federated.adapters.update_codec import encoded
from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import seal_reply
from federated.protocol.framing import PROTOCOL_VERSION
from federated.silo.line_file import close_log, private_log
from federated.silo.local_training import public_update
from federated.silo.requests import check_sender, decode, open_envelope, update_dtype_of
from federated.silo.units import load_units, split_key
from federated.silo.workbench import Workbench, public_base_model
from privacy.ledger.anchor import Anchor
from privacy.ledger.chain import History
from privacy.ledger.file import read_only
from privacy.ledger.journal import RECONCILE, anchor_dir_of
from privacy.mechanism.streams import Streams
from privacy.plan import PlanTerms
from privacy.signing import Signer


class PublicSilo:
    """Trains without clipping and noise, to show what privacy costs. Exists only for data declared public.

    Raises:
        PolicyRefusal: the data is not declared public.
        InputError: the base model, the data or the silo's keys can't be used.
    """

    def __init__(self, config: SiloConfig, trusted: frozenset[str], plan: PlanTerms) -> None:
        if not config.data.public:
            raise PolicyRefusal(
                f"silo {config.silo.id!r}: training without DP needs data declared public = true",
                rule="public",
                asked="no DP",
                allowed="data declared public",
            )
        self._config, self._trusted = config, trusted
        self._signer, key = _own_keys(config)
        self._log = private_log(Path(config.silo.state_dir))
        self._workbench = Workbench(config, public_base_model(config), load_units(config, key), self._log)
        self._plan = plan.bind(config.silo.public_record_count)  # for its batches

    def close(self) -> None:
        """Closes the silo's files."""
        close_log(self._log)

    def handle(self, content: bytes) -> bytes:
        """Answers like a silo, without receipts."""
        silo = self._config.silo
        envelope = open_envelope(content, self._config.policy.max_request_bytes)
        digest = digest_bytes(envelope.body)
        request = decode(envelope.body, silo.id)
        check_sender(envelope, request, self._trusted)
        kind = request.WhichOneof("kind")
        reply = pb.Reply(version=PROTOCOL_VERSION, silo_id=silo.id, request_digest=digest)
        if kind == "describe":
            count, key = silo.public_record_count, self._signer.public_key
            reply.described.CopyFrom(
                pb.Described(dataset_id=silo.dataset_id, public_key=key, public_record_count=count)
            )
        elif kind == "reserve":
            reply.reserved.SetInParent()
        elif kind == "close":
            reply.closed.SetInParent()
        else:
            reply.trained.update = self._update(request.train, digest)
        return seal_reply(self._signer, reply.SerializeToString(deterministic=True))

    def _update(self, train: pb.Train, digest: str) -> bytes:
        bench, streams = self._workbench, Streams(bytes(32), digest)  # of public data batches may be predictable
        model, adapter = bench.fitted(train, self._config.policy)
        settings, examples = bench.local_settings(train, self._config.policy), bench.examples(train)
        update = public_update(self._plan, streams, model, examples.task, adapter, examples.records, settings)
        return encoded(update, update_dtype_of(train))


def _own_keys(config: SiloConfig) -> tuple[Signer, bytes]:
    """The silo's signing key, and that of its split.

    Raises:
        InputError: one of them is lost, or its ledger is.
    """
    split = own_split_key(config)
    return own_signer(config), split


def own_signer(config: SiloConfig) -> Signer:
    """The signing key of a simulated silo, made where there is no ledger yet.

    Raises:
        InputError: it is lost.
    """
    files = SiloFiles(private_folder(Path(config.silo.state_dir)))
    if files.ledger.exists():
        load_secret(files.key)  # never a new one beside it
    return Signer(files.key)


def own_split_key(config: SiloConfig) -> bytes:
    """The key of a simulated silo's split, which it keeps for good once it has a ledger.

    Raises:
        InputError: it is lost, or the ledger is.
    """
    files = SiloFiles(Path(config.silo.state_dir))
    files.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    anchor = anchor_dir_of(files.directory, config.silo.anchor_dir)
    if not files.ledger.exists() and Anchor(anchor).path.exists():
        raise InputError(f"{files.ledger}: missing, and {anchor} tells of it; put its backup back, or run {RECONCILE}")
    bodies = History.of(read_only(files.ledger)).bodies if files.ledger.exists() else []
    return split_key(files, bodies)
