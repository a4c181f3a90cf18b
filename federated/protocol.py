"""What both ends of a silo's boundary must agree on."""

PROTOCOL_VERSION = 2
MAX_MESSAGE_BYTES = 256 * 2**20
