"""Replicas on a Ray cluster, for as long as a command serves."""

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cluster.runtime.session import address_of, ray_session, refuse_without_room
from cluster.serving.replicas.offer import Offer
from cluster.serving.replicas.replica import NAMESPACE, Office, Replica
from configs.errors import InputError, SiloweaveError, lines_of
from configs.schema.pretrain import ClusterSettings

_QUIET = {"enable_access_log": False, "log_level": "ERROR"}  # no path and no word of a request is written anywhere


@contextmanager
def replicas(offer: Offer, count: int, cpus: int) -> Iterator[tuple[Any, Any]]:
    """Starts replicas by Ray Serve on the Ray of RAY_ADDRESS, else on one of our own, and ends them afterwards.

    Args:
        offer: what each of them serves.
        count: of replicas.
        cpus: that each reserves; its threads.

    Yields:
        Ray Serve's handle, and the office that knows them.

    Raises:
        InputError: the cluster has no room for them, or a model can't be served.
        SiloweaveError: they could not be started.
    """
    settings = ClusterSettings(threads_per_rank=cpus)
    with ray_session(settings, count) as ray:
        refuse_without_room(ray, "--replicas", count, cpus)
        from ray import serve
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        name = f"siloweave-{uuid.uuid4().hex[:12]}"
        # On this node: with another one the door would lose what tells it of its replicas, though all of them live.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        placed = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "scheduling_strategy": here}
        office: Any = ray.remote(Office).options(**placed).remote()
        found = _there(ray)
        # No proxy of Ray's: it would take bodies of any size, from anybody, and its requests die with a replica.
        serve.start(proxy_location="Disabled", logging_config=dict(_QUIET))
        try:
            yield _run(ray, serve, name, office, _deployment(serve, offer, name, count, cpus)), office
        finally:
            with suppress(Exception):  # the cluster itself may be gone
                serve.delete(name)
                # With our own Ray all of it ends; a Serve that was there before is others'.
                if address_of(settings) and not found and not serve.status().applications:
                    serve.shutdown()


def _there(ray: Any) -> bool:
    """Whether Ray Serve runs on this Ray already."""
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def _deployment(serve: Any, offer: Offer, name: str, count: int, cpus: int) -> Any:
    made = serve.deployment(
        Replica,
        name="replica",
        num_replicas=count,
        # What has no slot waits at the door, and goes to whichever replica has room first.
        max_ongoing_requests=offer.slots,
        max_constructor_retry_count=1,
        ray_actor_options={"num_cpus": cpus},
        logging_config=dict(_QUIET),
    )
    return made.bind(name, name, offer)


def _run(ray: Any, serve: Any, name: str, office: Any, bound: Any) -> Any:
    try:
        return serve.run(bound, name=name, route_prefix=None)
    except RuntimeError as error:
        if line := ray.get(office.refusal.remote()):
            raise InputError(line) from None
        raise SiloweaveError(f"the replicas can't be started: {lines_of(error)[0]}") from error
