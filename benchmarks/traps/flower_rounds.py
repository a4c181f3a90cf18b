"""One round of a Flower DP strategy, driven with real messages through Flower's own mods."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp import Grid, NeighboringRelation, PrivacyConfig, RdpAccountant, SamplingMethod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)
from flwr.supercore.task_identity import TaskIdentity

SIGMA, CLIP, SIZE = 0.8, 2.0, 200_000
FIXED = {
    "server side": DifferentialPrivacyServerSideFixedClipping,
    "client side": DifferentialPrivacyClientSideFixedClipping,
}
ADAPTIVE = {
    "server side": DifferentialPrivacyServerSideAdaptiveClipping,
    "client side": DifferentialPrivacyClientSideAdaptiveClipping,
}
logging.getLogger("flwr").setLevel(logging.ERROR)
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # whose messages these are


class Nodes(Grid):
    """A grid of so many nodes. Their messages are carried by ``one_round``."""

    def __init__(self, count: int) -> None:
        self.count = count

    def get_node_ids(self) -> list[int]:
        return list(range(2, 2 + self.count))

    def set_run(self, run: Any) -> None: ...
    @property
    def run(self) -> Any: ...
    def create_message(self, *_: Any, **__: Any) -> Any: ...
    def get_nodes(self) -> Any: ...
    def push_messages(self, *_: Any) -> Any: ...
    def pull_messages(self, *_: Any) -> Any: ...
    def send_and_receive(self, *_: Any, **__: Any) -> Any: ...


def fed_avg(count: int) -> FedAvg:
    return FedAvg(min_train_nodes=count, min_evaluate_nodes=count, min_available_nodes=count)


def accountant(sampling: SamplingMethod = SamplingMethod.NO_AMPLIFICATION) -> RdpAccountant:
    return RdpAccountant(PrivacyConfig(1e-5, 10, NeighboringRelation.ADD_OR_REMOVE_ONE, sampling))


def fixed(count: int, where: str = "server side", *, accounted: bool = False) -> Any:
    return FIXED[where](fed_avg(count), SIGMA, CLIP, count, accountant=accountant() if accounted else None)


def one_round(
    strategy: Any,
    updates: Sequence[np.ndarray | Error | None],
    weights: Sequence[int] | None = None,
    number: int = 1,
    **metrics: float,
) -> tuple[np.ndarray | None, Any]:
    """Configures a round from a model of zeros, answers with these updates (None: no answer), and aggregates.

    Client-side strategies get replies that went through Flower's own mod.
    """
    size = next(update.size for update in updates if isinstance(update, np.ndarray))
    start = ArrayRecord([np.zeros(size, np.float32)])
    messages = list(strategy.configure_train(number, start, ConfigRecord(), Nodes(len(updates))))
    replies = []
    for position, (message, update) in enumerate(zip(messages, updates, strict=True)):
        if isinstance(update, Error):
            replies.append(Message(update, reply_to=message))
        elif update is not None:
            weight = weights[position] if weights else 1
            replies.append(answer(strategy, message, update, {"num-examples": weight, **metrics}))
    arrays, found = strategy.aggregate_train(number, replies)
    return (arrays.to_numpy_ndarrays()[0] if arrays else None), found


def answer(strategy: Any, message: Message, update: np.ndarray, metrics: dict[str, Any]) -> Message:
    def client(asked: Message, _: Context) -> Message:
        content = {"arrays": ArrayRecord([update.copy()]), "metrics": MetricRecord(metrics)}
        return Message(RecordDict(content), reply_to=asked)

    context = Context(1, 1, {}, RecordDict(), {})
    if isinstance(strategy, FIXED["client side"]):
        return fixedclipping_mod(message, context, client)
    if isinstance(strategy, ADAPTIVE["client side"]):
        return adaptiveclipping_mod(message, context, client)
    return client(message, context)


def constant(value: float, size: int = 4) -> np.ndarray:
    return np.full(size, value, np.float32)
