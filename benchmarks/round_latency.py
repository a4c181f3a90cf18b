"""Seconds of a federated round over TLS, ours beside a stock Flower app, and where they go; bytes of a round.

python benchmarks/round_latency.py --model runs/tiny/model --repetitions 3 --json latency.json

Ours is `federation run` over SuperLink and nginx on loopback, two relays and two silo services: the relay hands each
message to a warm service. The stock app runs over a SuperLink and two SuperNodes of its own, as Flower starts them: its
ClientApp loads torch, the same model and adapter itself and takes the same number of steps, for each message anew, as
Flower starts a process for each. Its steps are plain Adam on as many records as a private batch has on average; ours
are DP-SGD. The two alternate.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import tomli_w
from figures import setting, spread

REPOSITORY = Path(__file__).parents[1]
APP = Path(__file__).parent / "peers" / "stock_round"
SILOS = ("comedies", "histories")
STEPS = 2
WAIT_S = 300.0


class FederationFolder:
    """Silos and their coordinator on this machine, made by the product's own commands.

    Args:
        root: an empty folder.
        model: an exported model.
        names: of the silos.
        listen: where nginx listens; whoever asks for localhost is to get there.
        stock: whether Flower's own SuperLink and SuperNodes are started, too.
        policy: of each silo, beside its budget.
    """

    def __init__(
        self,
        root: Path,
        model: Path,
        names: Sequence[str] = SILOS,
        listen: str = "127.0.0.1",
        *,
        stock: bool = True,
        policy: Mapping[str, Any] | None = None,
    ) -> None:
        from federated.deployment.flower_programs import flower_environment
        from federated.deployment.ports import free_port

        self.root, self.folder, self.model = root, root / "federation", model.absolute()
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.flower = {**self.environment, **flower_environment(root / "stock")}
        self.processes: list[psutil.Popen] = []
        self.marks: dict[str, str] = {}
        self.port, self.policy = free_port(), {"budget_epsilon": 100.0, **(policy or {})}
        host = ["--host", "localhost", "--listen", listen, "--port", str(self.port)]
        self.fingerprint = self.call("federation", "init", str(self.folder), "--name", "bench", *host).split()[-1]
        for name in names:
            self._add(name)
        self.start("federation", "serve", str(self.folder))
        if stock:
            self.serve_stock()
        self._wait()

    def _add(self, name: str) -> None:
        from configs.load import load
        from configs.parse import to_toml
        from federated.simulation.simulated_places import simulated_silo

        folder = self.root / name
        folder.mkdir()
        config = simulated_silo(load("tiny"), name, self.model)
        state = config.silo.model_copy(update={"state_dir": str(folder / "state")})
        policy = config.policy.model_copy(update=self.policy)
        silo, relay, socket = folder / "silo.toml", folder / "relay.toml", folder / "run" / "silo.sock"
        silo.write_text(to_toml(config.model_copy(update={"silo": state, "policy": policy})))
        card = self.folder / "coordinator.json"
        settings = {"state_dir": str(folder / "relay"), "coordinator": str(card), "silo_address": f"unix:{socket}"}
        relay.write_text(tomli_w.dumps({**settings, "coordinator_fingerprint": self.fingerprint}))
        self.call("silo", "relay", "-c", str(relay), "--init")
        mark = self.call("silo", "init", "-c", str(silo), "--relay", str(folder / "relay" / "relay.json")).split()[-1]
        self.call("silo", "trust", "-c", str(silo), str(card), "--fingerprint", self.fingerprint)
        enrolment = str(folder / "state" / "enrolment.json")
        self.call("federation", "enrol", str(self.folder), enrolment, "--fingerprint", mark)
        self.marks[name] = mark
        self.start("silo", "serve", "-c", str(silo), "--socket", str(socket))
        self.start("silo", "relay", "-c", str(relay))

    def _wait(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while True:
            if time.monotonic() > deadline:
                self.end()
                raise SystemExit(f"the silos are not online after {WAIT_S:g} s; see {self.root}")
            time.sleep(2)
            if not (self.folder / "state" / "processes.json").exists():
                continue
            silos = json.loads(self.call("federation", "status", str(self.folder), "--json"))["silos"].values()
            if {silo["status"] for silo in silos} == {"online"}:
                return

    def call(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "siloweave", *arguments]
        done = subprocess.run(command, env=self.environment, cwd=self.root, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{arguments}: {done.stderr}")
        return done.stdout

    def start(self, *arguments: str) -> None:
        self._start([sys.executable, "-m", "siloweave", *arguments], self.environment)

    def _start(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        with (self.root / "processes.log").open("ab") as log:
            process = psutil.Popen(command, env=environment or self.flower, cwd=self.root, stdout=log, stderr=log)
        self.processes.append(process)

    def end(self) -> None:
        from federated.deployment.supervisor import end_tree

        end_tree(self.processes, grace_s=20)

    def ours(self, number: int, rounds: int) -> dict[str, list[float]]:
        """One `federation run`: seconds of its rounds, and of the slower silo's part in each."""
        name = f"ours-{number}"
        shutil.copytree(self.model, self.root / "runs" / name / "model")
        overrides = {
            "run.name": name,
            "run.storage": str(self.root / "runs"),
            "federated.rounds": rounds,
            "federated.local_steps": STEPS,
            "privacy.epsilon": 1,
            "federated.min_silos": len(SILOS),
        }
        given = [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
        logs = {silo: self.root / silo / "state" / "audit.jsonl" for silo in SILOS}
        before = {silo: len(log.read_text().splitlines()) if log.exists() else 0 for silo, log in logs.items()}
        self.call("federation", "run", str(self.folder), "-c", "tiny", *given)
        events = [json.loads(line) for line in (self.root / "runs" / name / "federated" / "events.jsonl").open()]
        found = [event for event in events if event["event"] == "round"]
        parts = [in_silo(log.read_text().splitlines()[before[silo] :], rounds) for silo, log in logs.items()]
        return {
            "round": [event["seconds"] for event in found],
            "in the silo": [max(pair) for pair in zip(*parts, strict=True)],
            "bytes": [float(event["bytes"]) for event in found],
        }

    def serve_stock(self) -> None:
        """Flower's own SuperLink and SuperNodes, with the federation's certificates."""
        from federated.deployment.flower_programs import BIN
        from federated.deployment.ports import free_port

        port, made = free_port(), self.folder / "certificates"
        home = self.root / "stock"
        home.mkdir()
        link = {"address": f"localhost:{port}", "root-certificates": str(made / "ca.pem")}
        (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"stock": link}}))
        del self.flower["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"]  # ours; Flower's own is what is measured
        tls = ["--ssl-certfile", str(made / "superlink.pem"), "--ssl-ca-certfile", str(made / "ca.pem")]
        tls += [
            "--ssl-keyfile",
            str(self.folder / "keys" / "superlink.key"),
            "--disable-runtime-dependency-installation",
        ]
        self._start([str(BIN / "flower-superlink"), "--host", "127.0.0.1", "--port", str(port), *tls])
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.5)
        for _ in SILOS:
            node = ["--superlink", f"localhost:{port}", "--root-certificates", str(made / "ca.pem")]
            self._start([str(BIN / "flower-supernode"), *node, "--port", str(free_port())])

    def stock(self, number: int, rounds: int) -> dict[str, list[float]]:
        """One run of the stock app."""
        answer, settings = self.root / f"stock-{number}.json", self.root / "stock.toml"
        given = {"rounds": rounds, "steps": STEPS, "model": str(self.model), "to": str(answer)}
        settings.write_text(tomli_w.dumps(given))
        command = [str(Path(sys.executable).parent / "flwr"), "run", str(APP), "stock", "--run-config", str(settings)]
        subprocess.run(command, env=self.flower, cwd=self.root, check=True, capture_output=True)
        deadline = time.monotonic() + WAIT_S
        while not answer.exists():
            if time.monotonic() > deadline:
                raise SystemExit(f"the stock app has not answered; see {self.root}/processes.log")
            time.sleep(0.5)
        return dict(json.loads(answer.read_text()))


def in_silo(lines: list[str], rounds: int) -> list[float]:
    """Seconds from a request that was accepted to its reply's departure, of the rounds: after describe and reserve."""
    entries = [json.loads(line) for line in lines]
    arrived = [entry["time"] for entry in entries if entry["direction"] == "accepted"]
    left = [entry["time"] for entry in entries if entry["direction"] == "out"]
    return [end - begin for begin, end in list(zip(arrived, left, strict=True))[2 : 2 + rounds]]


def full_model_bytes(model: Path) -> int:
    """Bytes of a round that sends the whole model to each silo and back, in float32."""
    from safetensors.numpy import load_file

    values = sum(array.size for file in model.glob("*.safetensors") for array in load_file(file).values())
    return values * 4 * 2 * len(SILOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="an exported model, as runs/tiny/model")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="round-latency-"))
    federation = FederationFolder(root, options.model)
    runs: dict[str, dict[str, list[float]]] = {"ours": {}, "stock": {}}
    try:
        for number in range(options.repetitions):
            for name, run in (("ours", federation.ours), ("stock", federation.stock)):
                for part, values in run(number, options.rounds).items():
                    runs[name].setdefault(part, []).extend(values)
    finally:
        federation.end()
    result: dict[str, Any] = {
        **setting(["siloweave", "flwr", "torch", "transformers"]),
        "rounds": options.rounds,
        "repetitions": options.repetitions,
        "figures": {name: {part: spread(values) for part, values in parts.items()} for name, parts in runs.items()},
        "bytes_full_model": full_model_bytes(options.model),
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
