"""Identities: private keys, public cards, the parties that each side trusts, and X.509 certificates."""
