"""Where a run and a silo keep what: the one home of the names that lie on disk."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from configs.storage.files import digest_bytes

CONFIG, EVENTS, CERTIFICATE = "config.toml", "events.jsonl", "certificate.json"
EARLIER_CERTIFICATE = "earlier-certificate.json"  # of the run that a federation continues, in that federation's folder
ARRIVALS, ARRIVED = "arrivals.jsonl", "arrived"  # of buffered rounds: the order of updates, and the newest of them
SECURE_EVALUATION = "secure-evaluation.json"  # the same of its newest private evaluation
SECURE_SUM = "secure-sum.json"  # of a run with secure aggregation: who has answered in which phase of its newest sum
CALIBRATION = "calibration.json"  # beside a finished model: how its answers are read
FEDERATED, NO_DP = "federated", "federated-no-dp"  # a federation's stage, and its folder
AGGREGATOR_FOLDER = "aggregator"  # of the coordinator's own ledger, where clients are the units

_LONGEST_NAME = 255 - len(".anchor")  # file systems hold names of 255 bytes, a suffix included


def name_on_disk(name: str, safe: str) -> str:
    """A silo may be called anything, "../x" too, and 100 characters of any script may be too long for a file's name.

    Args:
        name: the silo's.
        safe: signs that stand for themselves, beside letters and digits.
    """
    quoted = quote(name, safe=safe).replace(".", "%2E")
    if len(quoted) > _LONGEST_NAME:
        return f"{quoted[:100]}%~{digest_bytes(name.encode())}"  # as no quoted name is
    return quoted


@dataclass(frozen=True)
class RunFiles:
    """The files and folders of a run.

    Attributes:
        directory: the run's.
    """

    directory: Path

    @property
    def config(self) -> Path:
        """The settings that it was started with."""
        return self.directory / CONFIG

    @property
    def lock(self) -> Path:
        """Held by the command that works on the run; beside its directory, which may be renamed meanwhile."""
        return self.directory.with_name(f".{self.directory.name}.lock")

    @property
    def events(self) -> Path:
        """One line per event. A federation's folder has a log of its own by this name."""
        return self.directory / EVENTS

    @property
    def corpus_parts(self) -> Path:
        """Parts of a corpus that is being prepared."""
        return self.directory / "corpus-parts"

    @property
    def corpus(self) -> Path:
        """The packed public text."""
        return self.directory / "corpus"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that was trained on the public text."""
        return self.directory / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        """Pretraining's commits, where they don't go to an object store."""
        return self.directory / "pretrain" / "checkpoints"

    @property
    def model(self) -> Path:
        """The exported base model."""
        return self.directory / "model"

    @property
    def federated(self) -> Path:
        """The federation under DP."""
        return self.directory / FEDERATED

    @property
    def no_dp(self) -> Path:
        """The federation without DP, of a simulation with public silos."""
        return self.directory / NO_DP

    @property
    def certificate(self) -> Path:
        """What the federation under DP has spent and released."""
        return self.federated / CERTIFICATE

    @property
    def evaluation(self) -> Path:
        """Bits per character by round."""
        return self.directory / "evaluation.json"

    @property
    def sample(self) -> Path:
        """A text of the final model."""
        return self.directory / "sample.txt"

    @property
    def explanations(self) -> Path:
        """Answers of the final model, and why it gave them, for machines."""
        return self.directory / "explanations.json"

    @property
    def explained_page(self) -> Path:
        """The same for people."""
        return self.directory / "explanations.html"

    @property
    def showcase(self) -> Path:
        """What the run's models say to the same prompts, for machines."""
        return self.directory / "showcase.json"

    @property
    def showcase_page(self) -> Path:
        """The same for people."""
        return self.directory / "showcase.html"

    @property
    def synthetic(self) -> Path:
        """Records that the final model has written."""
        return self.directory / "synthetic"

    @property
    def dossier(self) -> Path:
        """What who approves a release is given."""
        return self.directory / "dossier"

    @property
    def report(self) -> Path:
        """The report for machines; a run that has one is finished."""
        return self.directory / "report.json"

    @property
    def page(self) -> Path:
        """The report for people."""
        return self.directory / "report.html"

    @property
    def audit(self) -> Path:
        """The newest audit's folder."""
        return self.directory / "audit"

    @property
    def audit_report(self) -> Path:
        """What the newest audit has found."""
        return self.audit / "audit.json"

    @property
    def tune(self) -> Path:
        """A search's folder."""
        return self.directory / "tune"

    @property
    def tune_report(self) -> Path:
        """What the search knows of its trials."""
        return self.tune / "tune.json"

    @property
    def tensorboard(self) -> Path:
        """Curves for TensorBoard."""
        return self.directory / "tensorboard"

    @property
    def mlflow(self) -> Path:
        """The id that this run has in MLflow."""
        return self.directory / "mlflow.json"


@dataclass(frozen=True)
class SiloFiles:
    """The files and folders of a silo, or of the aggregator's ledger.

    Attributes:
        directory: the silo's ``state_dir``.
    """

    directory: Path

    @property
    def key(self) -> Path:
        """Signs ledger entries and replies."""
        return self.directory / "silo.key"

    @property
    def source(self) -> Path:
        """Names, sizes and digests of the files that the records were last read from. Private."""
        return self.directory / "source.json"

    @property
    def split_key(self) -> Path:
        """Decides which units are held out."""
        return self.directory / "split.key"

    @property
    def ledger(self) -> Path:
        """The ledger: what was spent."""
        return self.directory / "ledger.sqlite"

    @property
    def log(self) -> Path:
        """The silo's own log."""
        return self.directory / "silo.log"

    @property
    def traffic(self) -> Path:
        """Requests that were accepted, and their replies."""
        return self.directory / "audit.jsonl"

    @property
    def strangers(self) -> Path:
        """What came in without a trusted coordinator's signature, and what was answered."""
        return self.directory / "strangers.jsonl"

    @property
    def personal(self) -> Path:
        """The personal adapter."""
        return self.directory / "personal"

    @property
    def released(self) -> Path:
        """What left in the rounds, and what asked for it, where ``silo.keep_released`` is set."""
        return self.directory / "released"

    @property
    def remainders(self) -> Path:
        """What updates left out of open runs' rounds, to be added to the next one. It has noise, and stays here."""
        return self.directory / "remainders"

    @property
    def attack_report(self) -> Path:
        """How well the silo's own members are told from its held-out records. Private."""
        return self.directory / "attack" / "attack.json"

    @property
    def attack_page(self) -> Path:
        """The same for people. Private."""
        return self.directory / "attack" / "attack.html"

    @property
    def enrolment(self) -> Path:
        """What coordinators get."""
        return self.directory / "enrolment.json"

    @property
    def trusted(self) -> Path:
        """A file for each coordinator that may ask."""
        return self.directory / "trusted"

    @property
    def mandates(self) -> Path:
        """A file for each study that may ask. Once this folder is there, nothing else may."""
        return self.directory / "mandates"

    @property
    def revoked_mandates(self) -> Path:
        """Mandates that are in force no longer, by their digests."""
        return self.mandates / "revoked"

    @property
    def roster(self) -> Path:
        """A file for each other silo whose key the steward has confirmed."""
        return self.directory / "roster"

    @property
    def tls(self) -> Path:
        """Authority, keys and certificates of service and relay."""
        return self.directory / "tls"

    @property
    def service_key(self) -> Path:
        """The service's private key for TLS."""
        return self.tls / "service.key"

    @property
    def service_certificate(self) -> Path:
        """The service's certificate for TLS."""
        return self.tls / "service.crt"
