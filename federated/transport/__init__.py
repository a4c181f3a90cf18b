"""Carries envelopes: Flower messages, relay, gRPC, and imports neither torch nor trainer nor privacy."""
