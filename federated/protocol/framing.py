"""What both ends of a silo's boundary must agree on."""

from collections.abc import Iterator
from hashlib import shake_256

PROTOCOL_VERSION = 3
ROUNDED_VERSION = 4  # of a run whose updates travel rounded: a silo that does not know of it has to refuse
SECURE_VERSION = 6  # of a run with secure aggregation, for the same reason; with 5, evaluations were not added up
COMPRESSED_VERSION = 7  # of a run whose plan says how updates become few bytes
SPOKEN = (PROTOCOL_VERSION, ROUNDED_VERSION, SECURE_VERSION, COMPRESSED_VERSION)
SERVICE = "siloweave.v1.Silo"  # the name under which the health service tells of it
CHUNK_BYTES = 2**20
# Of one request or reply that Flower carries. Its SuperLink keeps each as one value of SQLite's, which has at most 10^9
# bytes, with some to spare for Flower's own frame. The proxy's limit is derived from this one.
LARGEST_MESSAGE_BYTES = 900 * 2**20
QUEUE = "queue"  # the rule of a refusal that says nothing but "later"


def version_of(update_dtype: str, *, secure: bool, compressed: bool) -> int:
    """The version of a run's requests: the oldest one that has words for what they ask."""
    if secure:
        return SECURE_VERSION
    if compressed:
        return COMPRESSED_VERSION
    return PROTOCOL_VERSION if update_dtype == "float32" else ROUNDED_VERSION


def chunks(content: bytes) -> Iterator[bytes]:
    """A message in parts of at most ``CHUNK_BYTES``; an empty one has one empty part."""
    for start in range(0, max(len(content), 1), CHUNK_BYTES):
        yield content[start : start + CHUNK_BYTES]


def filler(request_digest: str, size: int) -> bytes:
    """So many bytes for a line to carry: nobody can say anything by them, since they follow from the request."""
    return shake_256(f"siloweave filler\n{request_digest}".encode()).digest(size)
