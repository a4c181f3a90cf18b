"""Siloweave silo, siloweave federation."""
