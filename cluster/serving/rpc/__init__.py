"""The same operations over gRPC."""
