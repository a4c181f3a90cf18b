"""A Ray cluster on this machine, for commands that join it, to which nodes come and from which they go."""

from contextlib import contextmanager
from functools import partial


@contextmanager
def ray_cluster():
    """One node with a CPU.

    Yields:
        ``ray.cluster_utils.Cluster``, and what adds such a node to it.
    """
    from ray._private.services import node_ip_address_from_perspective
    from ray.cluster_utils import Cluster

    # Where a Ray of our own is up in this process, nodes would have its address, and that is on loopback.
    node = {"num_cpus": 1, "node_ip_address": node_ip_address_from_perspective()}
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **node})
    try:
        yield cluster, partial(cluster.add_node, **node)
    finally:
        cluster.shutdown()
