"""The privacy engine: plan, sampling, clipping, noise, accounting, ledger, certificate.

Knows no model and no network.
"""
