"""Digests of a model, as a certificate has them, for tests that make none."""

from privacy.certificate.model_digests import ModelDigests, RoundDigests

FILES = {"adapter_config.json": "aa" * 32, "adapter_model.safetensors": "bb" * 32}


def model_of(*releases):
    """One round for each mapping of ledgers to the digests of what they released."""
    rounds = tuple(RoundDigests(adapter="cc" * 32, releases=dict(found)) for found in releases)
    return ModelDigests(base_model="dd" * 32, rounds=rounds, adapter=FILES)
