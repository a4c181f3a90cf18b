"""Seconds of a step that silos take together over TLS, on loopback and with the latency of a long line.

python benchmarks/shared_steps.py --model runs/tiny/model --json shared_steps.json

`federation run` over SuperLink and nginx, three relays and three silo services, all on this machine, with
`privacy.mode = "distributed"`: a round is one step, in five exchanges. Between the relays and nginx lies a forwarder
that hands every block on after half of the latency, in both directions. It slows no bytes down, and nginx, SuperLink
and the coordinator's program are beside each other, as they are when deployed. Beside it each latency has rounds of the
same silos and the same work without masks (one exchange), and with masks where each adds its own noise.
"""

import argparse
import json
import queue
import shutil
import socket
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from figures import setting, spread
from round_latency import FederationFolder

NAMES = ("comedies", "histories", "roman")
BEHIND = "127.0.0.2"  # nginx; the forwarder is at 127.0.0.1, on the same port
PLAIN = {"federated.local_steps": 1, "federated.optimizer": "sgd", "privacy.epsilon": 2}
MASKED = {**PLAIN, "federated.secure_aggregation": True, "federated.colluders": 1}
MODES = {
    "without masks": PLAIN,
    "masks, noise of each": MASKED,
    "distributed": {**MASKED, "privacy.mode": "distributed", "privacy.min_honest": 2},
}


class LongLine:
    """Carries TCP from loopback to nginx; each block arrives ``one_way_s`` after it was sent."""

    def __init__(self, port: int) -> None:
        self.one_way_s, self._port = 0.0, port
        self._server = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._server.accept()
            try:
                far = socket.create_connection((BEHIND, self._port))
            except OSError:  # nginx is not there yet: relays ask again
                near.close()
                continue
            for source, target in ((near, far), (far, near)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                blocks: queue.Queue[tuple[float, bytes]] = queue.Queue()
                threading.Thread(target=self._read, args=(source, blocks), daemon=True).start()
                threading.Thread(target=self._write, args=(target, blocks), daemon=True).start()

    def _read(self, source: socket.socket, blocks: "queue.Queue[tuple[float, bytes]]") -> None:
        block = b"."
        while block:
            try:
                block = source.recv(65536)
            except OSError:
                block = b""
            blocks.put((time.monotonic() + self.one_way_s, block))

    def _write(self, target: socket.socket, blocks: "queue.Queue[tuple[float, bytes]]") -> None:
        with suppress(OSError):
            while True:
                due, block = blocks.get()
                time.sleep(max(0.0, due - time.monotonic()))
                if not block:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(block)


def run(federation: FederationFolder, name: str, settings: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """One `federation run`; its first round, in which what is warm later is not yet, is left out."""
    storage = federation.root / "runs"
    shutil.copytree(federation.model, storage / name / "model")
    given = {
        **settings,
        "run.name": name,
        "run.storage": str(storage),
        "federated.rounds": rounds + 1,
        "federated.min_silos": len(NAMES),
    }
    written = {key: str(value).lower() if isinstance(value, bool) else value for key, value in given.items()}
    overrides = [part for key, value in written.items() for part in ("--set", f"{key}={value}")]
    federation.call("federation", "run", str(federation.folder), "-c", "tiny", *overrides)
    events = [json.loads(line) for line in (storage / name / "federated" / "events.jsonl").open()]
    found = [event for event in events if event["event"] == "round"][1:]
    if any(sorted(event["answered"]) != sorted(NAMES) for event in found):
        raise SystemExit("a silo was not in a round")
    return {"seconds": [event["seconds"] for event in found], "bytes": [float(event["bytes"]) for event in found]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="an exported model, as runs/tiny/model")
    parser.add_argument("--rounds", type=int, default=3, help="of each mode and latency, after one that warms up")
    parser.add_argument("--latency-ms", type=float, nargs="+", default=[0.0, 50.0, 200.0], help="there and back")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="shared-steps-"))
    policy = {"honest_silos": 2}
    federation = LinedFolder(root, options.model, NAMES, BEHIND, stock=False, policy=policy)
    figures: dict[str, Any] = {}
    try:
        for latency in options.latency_ms:
            federation.line.one_way_s = latency / 2000
            for mode in options.modes:
                found = run(
                    federation, f"{mode.replace(', ', '-').replace(' ', '-')}-{latency:g}", MODES[mode], options.rounds
                )
                figures.setdefault(f"{latency:g} ms", {})[mode] = {name: spread(of) for name, of in found.items()}
                print(f"{latency:g} ms, {mode}: {figures[f'{latency:g} ms'][mode]}", flush=True)
                document = {
                    **setting(["siloweave", "flwr", "torch", "cryptography"]),
                    "rounds": options.rounds,
                    "figures": figures,
                }
                options.json.write_text(json.dumps(document, indent=2) + "\n")
    finally:
        federation.end()
    shutil.rmtree(root)


class LinedFolder(FederationFolder):
    """The same behind a long line, whose silos know each other."""

    def start(self, *arguments: str) -> None:
        """Starts a process; before the federation's own the line is there, and the silos' rosters."""
        if arguments[:2] == ("federation", "serve"):
            self.line = LongLine(self.port)
            for name in self.marks:
                for other in set(self.marks) - {name}:
                    card = self.root / other / "state" / "enrolment.json"
                    at = ["-c", str(self.root / name / "silo.toml"), "--fingerprint", self.marks[other]]
                    self.call("silo", "roster", "--add", str(card), *at)
        super().start(*arguments)


if __name__ == "__main__":
    main()
