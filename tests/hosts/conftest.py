"""One federation on several hosts, shared by all tests of this folder."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from host_deployment import HostDeployment
from hosts import lan, why_no_hosts

SILOS = ("comedies", "histories", "roman")
BEHIND_PROXY, SMALL_DISK = "histories", "roman"


@pytest.fixture(scope="session")
def hosts_here() -> None:
    """Skips, before anything else is made, where there can be no hosts."""
    reason = why_no_hosts()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def federation(hosts_here, tiny_run) -> Iterator[HostDeployment]:
    """A coordinator and three silos, one of them behind a proxy; where netem is there, lines are slow."""
    root = Path(tempfile.mkdtemp(prefix="hosts-"))  # pytest's own folders are too long for a socket
    try:
        with lan(delay_ms=20, loss_percent=1) as network:
            deployment = HostDeployment(root, tiny_run.model, network, BEHIND_PROXY, SMALL_DISK)
            try:
                deployment.boot_proxy()
                deployment.init()
                deployment.serve()
                deployment.add_sites(*SILOS)
                for site in deployment.sites.values():
                    deployment.start_site(site)
                yield deployment
            finally:
                deployment.end()
    finally:
        shutil.rmtree(root)
