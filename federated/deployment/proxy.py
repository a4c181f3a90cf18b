"""The proxy before the SuperLink: nginx, which lets silos reach the paths below and nothing else.

The configuration names its files relative to itself: nginx can't quote a `$`, and a folder may be called anything.

Flower's control, fleet and runtime interfaces share one port, and the first has no authentication: whoever reaches it
registers nodes and runs bundles.
"""

import os
import shutil
import socket
import ssl

from configs.errors import InputError
from configs.schema.addresses import join_address
from configs.storage.files import write_atomic
from federated.deployment.federation_folder import FederationFolder
from federated.deployment.flower_programs import LOOPBACK
from federated.deployment.supervisor import Program
from federated.protocol.framing import LARGEST_MESSAGE_BYTES

# What an authenticated SuperNode calls (flwr/supernode/fleet_http_client.py). Not register-node and unregister-node:
# nodes are registered by the coordinator.
FLEET_PATHS = tuple(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "pull-object",
        "push-object",
        "confirm-message-received",
    )
)
# An adapter is one object of Flower's, and no array that Flower would cut in pieces. All else is short: a silo could
# otherwise announce a reply of millions of objects, whose list the coordinator takes in whole.
LARGEST_BODY, LARGEST_OBJECT = "1m", f"{LARGEST_MESSAGE_BYTES // 2**20 + 1}m"
_OBJECT_PATH = "/v1/fleet/push-object"
HANDSHAKE_S = 5.0
_FOR_ALL = {"0.0.0.0": LOOPBACK, "::": "::1"}  # noqa: S104  (where to knock, not to listen)
_BUFFERS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
_TEMPLATE = """# Written at every start of `siloweave federation serve`.
daemon off;
worker_processes 2;
pid state/nginx.pid;
error_log stderr warn;
{user}
events {{ worker_connections 4096; }}
http {{
  server_tokens off;
  map $status $refused {{ ~^[23] 0; default 1; }}
  access_log state/refused.log combined if=$refused;
  ssl_protocols TLSv1.3;
{buffers}
  server {{
    listen {listen} ssl;
    ssl_certificate certificates/proxy.pem;
    ssl_certificate_key keys/proxy.key;
    location / {{ return 403; }}
{locations}
  }}
}}
"""
# Exact paths, and the path that is passed on is written here: nothing that a client spells differently gets through.
_LOCATION = """    location = {path} {{
      limit_except POST {{ deny all; }}
      client_max_body_size {largest};
      proxy_pass https://{loopback}:{superlink_port}{path};
      proxy_http_version 1.1;
      proxy_ssl_verify on;
      proxy_ssl_name localhost;
      proxy_ssl_trusted_certificate certificates/ca.pem;
      proxy_ssl_session_reuse on;
    }}"""


def configuration(federation: FederationFolder, superlink_port: int) -> str:
    """nginx.conf for a federation whose SuperLink listens on a loopback port."""
    locations = (
        _LOCATION.format(
            path=path,
            largest=LARGEST_OBJECT if path == _OBJECT_PATH else LARGEST_BODY,
            loopback=LOOPBACK,
            superlink_port=superlink_port,
        )
        for path in FLEET_PATHS
    )
    return _TEMPLATE.format(
        # Started as root, nginx would give its workers to `nobody`, who can't write below a private folder.
        user="user root;" if os.geteuid() == 0 else "",
        buffers="\n".join(f"  {name}_temp_path state/nginx/{name};" for name in _BUFFERS),
        listen=join_address(federation.config.listen, federation.config.port),
        locations="\n".join(locations),
    )


def find_nginx() -> str:
    """Where nginx is.

    Raises:
        InputError: it is not installed.
    """
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise InputError(
            "nginx: not installed; install the package nginx (apt-get install nginx-light), then try again"
        )
    return found


def proxy(federation: FederationFolder, superlink_port: int) -> Program:
    """The proxy as a program of the supervisor; writes its configuration."""
    (federation.state / "nginx").mkdir(exist_ok=True)
    path = federation.folder / "nginx.conf"  # what it names is looked for from where it lies
    write_atomic(path, configuration(federation, superlink_port).encode(), mode=0o600)
    command = (find_nginx(), "-e", "stderr", "-p", str(federation.folder), "-c", str(path))
    listens = ((federation.config.listen, federation.config.port),)
    return Program("nginx", command, {"PATH": os.environ.get("PATH", "")}, lambda: _shakes_hands(federation), listens)


def _shakes_hands(federation: FederationFolder) -> bool:
    """Whether the proxy shows a certificate that silos accept: they check the same authority and host."""
    listen, host = federation.config.listen, federation.config.hosts[0]
    address = _FOR_ALL.get(listen, listen)
    context = ssl.create_default_context(cafile=str(federation.authority.path))
    try:
        with (
            socket.create_connection((address, federation.config.port), timeout=HANDSHAKE_S) as connection,
            context.wrap_socket(connection, server_hostname=host),
        ):
            return True
    except OSError:
        return False
