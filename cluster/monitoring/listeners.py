"""Who listens to a run's events, by its settings: one mechanism for bars, TensorBoard, MLflow and Prometheus."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from cluster.monitoring.prometheus import RayMetrics
from configs.events import Listener
from configs.run_directory import bind_run_directory
from configs.schema.schema import RunConfig


@contextmanager
def listening(config: RunConfig) -> Iterator[tuple[Listener, ...]]:
    """The listeners that ``monitoring`` asks for, open until the end of the context.

    Raises:
        InputError: one of them needs a package or a server that is not there.
    """
    monitoring = config.monitoring
    with ExitStack() as stack:
        listeners: list[Listener] = []
        if monitoring.tensorboard:
            from cluster.monitoring.tensorboard import TensorBoard

            listeners.append(stack.enter_context(TensorBoard(bind_run_directory(config))))
        if monitoring.mlflow:
            from cluster.monitoring.mlflow_sink import MLflow

            listeners.append(stack.enter_context(MLflow(config, bind_run_directory(config))))
        if monitoring.ray_metrics:
            listeners.append(RayMetrics(config.run.name))
        yield tuple(listeners)
