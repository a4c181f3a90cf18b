"""What crosses a silo's boundary: messages, their framing, signed envelopes."""
