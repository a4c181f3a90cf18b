"""The commands ``siloweave silo`` and ``siloweave federation``."""
