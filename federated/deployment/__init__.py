"""Processes on real machines: supervisor, SuperLink, proxy, relay, permissions, status."""
