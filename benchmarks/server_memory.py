"""Peak memory of a federation on one machine as silos are added: of the coordinator, and of the silos' processes.

coordinator: silos that answer at once with an update of 4 MB, over the local grid, and the real coordinator, which
folds replies as they come. Its own memory is the anonymous one; Ray's object store, which is shared and has a fixed
size, comes on top. hosts: real silos with 20 short records and a ledger each, one round under DP.

python benchmarks/server_memory.py --model runs/tiny/model --json server_memory.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from figures import setting, spreads
from workload import environment

from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import seal_reply
from federated.protocol.framing import PROTOCOL_VERSION
from privacy.signing import Signer

ARRAYS, RANK, WIDTH = 16, 4, 2**14  # 4 MB in float32
MB = 2**20


def adapter() -> dict[str, Any]:
    whole = np.full((RANK, WIDTH), 0.25, dtype=np.float32)
    return {f"layer{number:02d}.lora_A.weight": whole for number in range(ARRAYS)}


class Echo:
    """A silo that gives the shared adapter back as its update."""

    def __init__(self, folder: Path, name: str) -> None:
        self._name, self._signer = name, Signer(folder / f"{name}.key")

    def handle(self, content: bytes) -> bytes:
        from configs.storage.files import digest_bytes

        body = pb.Envelope.FromString(content).body
        request = pb.Request.FromString(body)
        reply = pb.Reply(version=PROTOCOL_VERSION, silo_id=self._name, request_digest=digest_bytes(body))
        if request.HasField("describe"):
            key = self._signer.public_key
            reply.described.CopyFrom(pb.Described(dataset_id="echo", public_key=key, public_record_count=1))
        elif request.HasField("train"):
            reply.trained.update = request.train.adapter
        elif request.HasField("reserve"):
            reply.reserved.SetInParent()
        else:
            reply.closed.SetInParent()
        return seal_reply(self._signer, reply.SerializeToString())

    def close(self) -> None:
        pass


class Peak:
    """The most anonymous memory of this process, looked at a hundred times a second."""

    def __init__(self) -> None:
        self.mb, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.mb = max(self.mb, memory_mb("RssAnon"))


def memory_mb(name: str, process: int | str = "self") -> float:
    """A line of a process's status."""
    return float(Path(f"/proc/{process}/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


def coordinator(silos: int, folder: Path, model: Path) -> dict[str, float]:  # noqa: ARG001
    """Peak memory of the coordinator over two rounds, and above what it had before them."""
    from cluster.runtime.session import ray_session
    from configs.events import EventLog
    from configs.load import load
    from configs.storage.manifests import Manifest, commit_manifest
    from federated.coordinator.parties import Parties
    from federated.coordinator.rounds import Coordinator
    from federated.simulation.local_grid import LocalGrid

    config = load("tiny", ["federated.rounds=2", f"federated.lora_rank={RANK}", "privacy.epsilon=1"])
    base = folder / "model"
    base.mkdir()
    commit_manifest(base, Manifest("model", ""))
    parties = Parties(Signer(folder / "coordinator.key"), silos)
    names = [f"{number:04d}" for number in range(silos)]
    log = EventLog(folder / "events.jsonl", ())
    with (
        ray_session(config.cluster, 2) as ray,
        LocalGrid(ray, partial(Echo, folder), names, workers=2, threads=1) as grid,
    ):
        run = Coordinator(grid, config, base, folder / "federation", parties, log, certify=False)
        before, began = memory_mb("RssAnon"), time.perf_counter()
        with Peak() as peak:
            run.run(adapter)
        seconds = time.perf_counter() - began
    return {"above_start_mb": peak.mb - before, "with_object_store_mb": memory_mb("VmHWM"), "seconds": seconds}


def hosts(silos: int, folder: Path, model: Path) -> dict[str, float]:
    """Peak memory of the fullest process that hosts silos, at the end of a round of all of them."""
    from cluster.runtime.session import ray_session
    from configs.load import load
    from federated.simulation.simulation import simulate

    rows = (
        {"silo": f"{silo:04d}", "text": f"note {number} of silo {silo}"}
        for silo in range(silos)
        for number in range(20)
    )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        f'data.private.source="{folder / "rows.jsonl"}"',
        'data.private.text="text"',
        'data.private.silo="silo"',
        'data.private.unit=""',
        "data.private.public_record_count=20",
        "data.private.public_record_counts={}",
        f'federated.state_dir="{folder / "state"}"',
        "federated.rounds=1",
    ]
    config, peaks = load("tiny", settings), []

    def look(event: dict[str, Any]) -> None:
        if event["event"] == "round":
            peaks.extend(_peak_mb(process) for process in psutil.Process().children(recursive=True))

    with ray_session(config.cluster, 2) as ray:
        began = time.perf_counter()
        simulate(ray, config, model, folder / "federation", on_event=look)
        seconds = time.perf_counter() - began
    return {"peak_mb": max(peaks), "coordinator_peak_mb": memory_mb("VmHWM"), "seconds": seconds}


def _peak_mb(process: psutil.Process) -> float:
    """Peak memory of a process that hosts silos; 0 for the others."""
    if not process.name().startswith("ray::SiloHost"):
        return 0.0
    return memory_mb("VmHWM", process.pid)


PARTS = {"coordinator": coordinator, "hosts": hosts}


def measured(part: str, silos: int, model: Path) -> dict[str, float]:
    """One of the above in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--model", str(model.absolute()), "--part", part, "--silos", str(silos)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=7200,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{part} with {silos} silos failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{part}, {silos} silos: {figures}", file=sys.stderr, flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="an exported model, runs/tiny/model for instance")
    parser.add_argument("--part", choices=PARTS, help="measures this one, in this process")
    parser.add_argument("--silos", type=int, nargs="+", default=[10, 50, 200], help="of the coordinator")
    parser.add_argument("--hosted", type=int, nargs="+", default=[100, 1000], help="of the hosts")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.part:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(PARTS[arguments.part](arguments.silos[0], Path(folder), arguments.model)))
        return
    counts = {"coordinator": arguments.silos, "hosts": arguments.hosted}
    found: dict[str, dict[int, list[dict[str, float]]]] = {}
    for _ in range(arguments.repetitions):
        for part, silos in ((part, silos) for part, several in counts.items() for silos in several):
            found.setdefault(part, {}).setdefault(silos, []).append(measured(part, silos, arguments.model))
    document = {
        **setting(("flwr", "ray", "torch")),
        "update_mb": 4 * ARRAYS * RANK * WIDTH / MB,
        "repetitions": arguments.repetitions,
        "figures": {part: {silos: spreads(runs) for silos, runs in rows.items()} for part, rows in found.items()},
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document["figures"], indent=2))


if __name__ == "__main__":
    main()
