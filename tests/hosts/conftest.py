"""One federation on several hosts, shared by all tests of this folder."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from host_deployment import HostDeployment
from hosts import lan, why_no_hosts

FAILED = pytest.StashKey[dict[Path, str]]()
SILOS = ("comedies", "histories", "roman")
BEHIND_PROXY, SMALL_DISK = "histories", "roman"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Remembers the first test of a file that fails."""
    report = yield
    if report.failed:
        item.config.stash.setdefault(FAILED, {}).setdefault(item.path, item.name)
    return report


def pytest_runtest_setup(item):
    """A file is one story: after a test that has failed, the others would wait in vain for what it should have left."""
    failed = item.config.stash.get(FAILED, {}).get(item.path)
    if failed:
        pytest.skip(f"goes on from where {failed} should have ended, which failed")


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
