"""The clients' work of simulation.py, and one engine that runs it: python simulated.py ENGINE WORK.json RECORD.json.

A client's training is the same few lines everywhere: plain SGD on the LoRA weights, on tokens that its number and the
round decide, which a decoder says and an encoder tells apart by their first one. So is the fold. Without training a
client answers with the adapter as it came, and all the rest stays.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from configs.storage.files import digest_bytes
from federated.adapters.arrays import from_bytes, to_bytes
from federated.aggregation.exact_sum import FixedPointSum

RANK, ALPHA, LEARNING_RATE = 8, 16, 0.05
STEPS, BATCH, TOKENS, VOCABULARY = 2, 8, 64, 512
THREADS = 1


@dataclass(frozen=True)
class Task:
    """What a client is asked: by itself enough to do it anywhere."""

    client: int
    round: int
    train: bool
    model: str


Exchange = Callable[[bytes, Sequence[Task]], Iterator[bytes]]


@cache
def warm_model(directory: str) -> Any:
    """The model with its adapter, once a process; an encoder with a head for two labels, and without dropout."""
    import torch
    from transformers import AutoConfig

    from trainer.models.adapters import add_adapter
    from trainer.models.load import Head, load_model

    torch.set_num_threads(THREADS)
    writes = AutoConfig.from_pretrained(directory).architectures[0].endswith("ForCausalLM")
    head = None if writes else Head("classification", 2, 0)
    return add_adapter(load_model(Path(directory), head=head), RANK, ALPHA, seed=0, head=head).eval()


def update_of(task: Task, content: bytes) -> bytes:
    """A client's answer to the shared adapter."""
    if not task.train:
        return content
    import torch

    from trainer.models.adapters import adapter_weights, load_adapter_weights, trainable

    model = warm_model(task.model)
    before = {name: torch.from_numpy(array) for name, array in from_bytes(content).items()}
    load_adapter_weights(model, before)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=LEARNING_RATE)
    generator = np.random.default_rng([task.client, task.round])
    for _ in range(STEPS):
        tokens = torch.from_numpy(generator.integers(VOCABULARY, size=(BATCH, TOKENS)))
        model(input_ids=tokens, labels=tokens if model.can_generate() else tokens[:, 0] % 2).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return to_bytes({name: (after - before[name]).numpy() for name, after in adapter_weights(model).items()})


class Drive:
    """The rounds of all engines: asks, folds as answers come, and times. ``finish`` gives what was measured."""

    def __init__(self, work: dict[str, Any]) -> None:
        self.work = work
        self.adapter = Path(work["adapter"]).read_bytes()
        self.began = psutil.Process().create_time()
        self.figures: dict[str, Any] = {}

    def run(self, exchange: Exchange) -> None:
        for name, train, rounds in (("training", True, self.work["rounds"]), ("empty", False, self.work["empty"])):
            self.figures.update({f"{name}_{key}": value for key, value in self._stage(exchange, train, rounds).items()})
        tree = _tree()
        self.figures["memory_mb"] = sum(process.memory_full_info().pss for process in tree) / 2**20
        self.figures["processes"] = len(tree)

    def _stage(self, exchange: Exchange, train: bool, rounds: int) -> dict[str, Any]:
        content = self.adapter
        for number in range(rounds + 1):  # the first one warms up
            clients = np.random.default_rng(number).choice(self.work["clients"], self.work["a_round"], replace=False)
            tasks = [Task(int(client), number, train, self.work["model"]) for client in clients]
            total = FixedPointSum(adapter := from_bytes(content))
            for update in exchange(content, tasks):
                total.add(from_bytes(update))
                self.figures.setdefault("start_s", time.time() - self.began)
            if total.count != len(tasks):
                raise SystemExit(f"{total.count} of {len(tasks)} clients answered")
            mean = total.mean()
            if train:
                content = to_bytes({name: array + mean[name] for name, array in adapter.items()})
            if number == 0:
                began, cpu_before = time.perf_counter(), _cpu_s()
        seconds, cpu_s, done = time.perf_counter() - began, _cpu_s() - cpu_before, rounds * len(tasks)
        result = digest_bytes(content if train else to_bytes(mean))
        return {"tasks_per_s": done / seconds, "cpu_ms_a_task": 1000 * cpu_s / done, "digest": result}


def _tree() -> list[psutil.Process]:
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def _cpu_s() -> float:
    """Processor seconds of this process and all below it: another job on the machine changes it less than the clock."""
    used = [process.cpu_times() for process in _tree()]
    return sum(times.user + times.system for times in used)


def plain_1(drive: Drive) -> None:
    """A loop."""
    drive.run(lambda content, tasks: (update_of(task, content) for task in tasks))


def _worker(pipe: Any) -> None:
    while True:
        content, tasks = pipe.recv()
        for task in tasks:
            pipe.send_bytes(update_of(task, content))


def plain_2(drive: Drive) -> None:
    """The same loop in two processes, each with every second client; this one folds what they send."""
    context = multiprocessing.get_context("spawn")
    pipes, ends = zip(*(context.Pipe() for _ in range(2)), strict=True)
    workers = [context.Process(target=_worker, args=(end,), daemon=True) for end in ends]
    for worker in workers:
        worker.start()

    def exchange(content: bytes, tasks: Sequence[Task]) -> Iterator[bytes]:
        left = {}
        for number, pipe in enumerate(pipes):
            left[pipe] = len(tasks[number::2])
            pipe.send((content, tasks[number::2]))
        while any(left.values()):
            for pipe in multiprocessing.connection.wait([pipe for pipe, count in left.items() if count]):
                yield pipe.recv_bytes()
                left[pipe] -= 1

    drive.run(exchange)
    for worker in workers:
        worker.terminate()
        worker.join()


def _body(task: Task, content: bytes) -> bytes:
    """A task as the request that a coordinator sends, whose fields the benchmark's clients read in their own way."""
    from federated.protocol import silo_pb2 as pb

    train = pb.Train(round=task.round, adapter=content, task="train" if task.train else "", optimizer=task.model)
    return pb.Request(silo_id=str(task.client), train=train).SerializeToString()


def answer(body: bytes) -> bytes:
    """What stands where a silo would: parses, does the task, replies."""
    from federated.protocol import silo_pb2 as pb

    request = pb.Request.FromString(body)
    train = request.train
    task = Task(int(request.silo_id), train.round, bool(train.task), train.optimizer)
    trained = pb.Trained(update=update_of(task, train.adapter))
    return pb.Reply(silo_id=request.silo_id, request_digest=digest_bytes(body), trained=trained).SerializeToString()


class Client:
    """A client as the local grid opens it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def handle(self, content: bytes) -> bytes:
        return answer(content)

    def close(self) -> None:
        pass


def grid_exchange(grid: Any, nodes: Sequence[int]) -> Exchange:
    """Messages over a Flower grid and back, as the coordinator sends them."""
    from flwr.app import Message

    from federated.protocol import silo_pb2 as pb
    from federated.transport.flower_messages import pack, unpack

    def exchange(content: bytes, tasks: Sequence[Task]) -> Iterator[bytes]:
        messages = [
            Message(pack(_body(task, content), content), nodes[task.client], "train", group_id=str(task.round))
            for task in tasks
        ]
        waiting = set(grid.push_messages(messages))
        while waiting:
            for message in grid.pull_messages(waiting):
                waiting.discard(message.metadata.reply_to_message_id)
                yield pb.Reply.FromString(unpack(message.content)).trained.update
            if waiting and drives_flower:
                time.sleep(0.1)  # as Flower's own send_and_receive waits

    drives_flower = type(grid).__module__.startswith("flwr")
    return exchange


def local_grid(drive: Drive) -> None:
    """Siloweave's grid: two workers, the product's relay, and the client's work behind it."""
    from cluster.runtime.session import ray_session
    from configs.schema.pretrain import ClusterSettings
    from federated.simulation.local_grid import LocalGrid

    names = [f"{client:05d}" for client in range(drive.work["clients"])]
    with (
        ray_session(ClusterSettings(threads_per_rank=THREADS), 2) as ray,
        LocalGrid(ray, Client, names, workers=2, threads=THREADS) as grid,
    ):
        drive.run(grid_exchange(grid, list(grid.get_node_ids())))


def flower(drive: Drive) -> None:
    """Flower's own engine with two clients at once: it starts a Ray of its own and shuts it down."""
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from federated.transport.client_app import make_app

    server = ServerApp()

    @server.main()
    def main(grid: Any, context: Any) -> None:  # noqa: ARG001
        while len(nodes := list(grid.get_node_ids())) < drive.work["clients"]:
            time.sleep(0.1)
        drive.run(grid_exchange(grid, sorted(nodes)))

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
    run_simulation(server, make_app(lambda *_: answer), drive.work["clients"], backend_config=resources)


ENGINES: dict[str, Callable[[Drive], None]] = {
    "plain_1": plain_1,
    "plain_2": plain_2,
    "local_grid": local_grid,
    "flower": flower,
}


if __name__ == "__main__":
    import simulated  # by its name, so that other processes find what is sent to them

    drive = simulated.Drive(json.loads(Path(sys.argv[2]).read_text()))
    simulated.ENGINES[sys.argv[1]](drive)
    Path(sys.argv[3]).write_text(json.dumps(drive.figures))
