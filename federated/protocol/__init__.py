"""What crosses the boundary: messages, framing, signed envelopes."""
