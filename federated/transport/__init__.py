"""The way of an envelope: Flower messages, relay, gRPC. It imports neither torch nor trainer nor privacy."""
