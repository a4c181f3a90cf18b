"""Asks the standard gRPC health service (grpc.health.v1), which silo service, SuperLink and SuperNode all have."""

from contextlib import closing

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 5.0
# What speaks gRPC is on the same machine or in the same house: a variable such as http_proxy must not send it away.
DIRECT = [("grpc.enable_http_proxy", 0)]


def is_serving(address: str, service: str = "", credentials: grpc.ChannelCredentials | None = None) -> bool:
    """Whether a service says that it is serving.

    Args:
        address: as gRPC writes it: ``HOST:PORT``, ``unix:PATH``.
        service: the service's full name; empty asks for the whole server.
        credentials: for TLS; None asks in the clear, on loopback or a Unix socket.
    """
    if credentials:
        channel = grpc.secure_channel(address, credentials, options=DIRECT)
    else:
        channel = grpc.insecure_channel(address, options=DIRECT)
    with closing(channel):
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT_S)
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
