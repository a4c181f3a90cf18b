"""What can go wrong in secure aggregation, by name. No message tells anything of a value or a key."""

from configs.errors import SiloweaveError


class SecureAggregationError(SiloweaveError):
    """The round, or one message of it, is refused; nothing is unmasked by it."""


class MalformedMessage(SecureAggregationError):
    """Bytes that are no message of this protocol: truncated, too long, or of another format."""


class UnknownVersion(SecureAggregationError):
    """A message of another version of the protocol."""


class WrongContext(SecureAggregationError):
    """A message of another round, base model, adapter, plan, roster or rule."""


class LateMessage(SecureAggregationError):
    """A message of a phase that is over."""


class EarlyMessage(SecureAggregationError):
    """A message of a phase that has not begun."""


class RepeatedMessage(SecureAggregationError):
    """A second message of one silo in one phase."""


class ForgedMessage(SecureAggregationError):
    """A signature, a ciphertext or a share that is not of whom it claims."""


class UnknownSilo(SecureAggregationError):
    """A silo that the roster lacks, or that was gone a phase ago."""


class TooFewSilos(SecureAggregationError):
    """Fewer silos are left than the round needs."""


class InconsistentView(SecureAggregationError):
    """The silos were not all told the same."""


class OutOfRange(SecureAggregationError):
    """A value that the encoding can't carry: clip first."""
