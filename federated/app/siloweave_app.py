"""The shim that Flower loads: it names the installed apps, each imported only in the process that runs it."""

from typing import Any

# `flwr build` parses this file for its components' names and never runs it.
__all__ = ["client", "server"]  # noqa: F822


def __getattr__(name: str) -> Any:
    """``server`` and ``client``: a silo's relay must never import what the coordinator needs."""
    if name == "server":
        from federated.coordinator.server_app import app

        return app
    if name == "client":
        from federated.transport.client_app import make_app, reach_service

        return make_app(reach_service)
    raise AttributeError(name)
