"""The shim that Flower loads: it names the installed apps, each imported only in the process that runs it."""

from typing import Any


def __getattr__(name: str) -> Any:
    """``server`` and ``client``: a silo's relay must never import what the coordinator needs."""
    if name == "server":
        from federated.server_app import app

        return app
    if name == "client":
        from federated.client_app import make_app, silo_service

        return make_app(silo_service)
    raise AttributeError(name)
