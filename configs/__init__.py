"""Settings of a run, and the contracts that every room shares: errors, manifests, events."""
