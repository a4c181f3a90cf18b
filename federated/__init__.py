"""The federation: silos and their service, the rounds of the coordinator, and the local grid of a simulation."""
