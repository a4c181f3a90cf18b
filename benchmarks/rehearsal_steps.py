"""A round's work in one silo as its rehearsal predicts it, beside the rounds that follow, in seconds of the processor.

python benchmarks/rehearsal_steps.py --model runs/tiny/model --steps 2 10 --json steps.json

One silo in this process, on one thread, and the trial as a rehearsal takes it, both by the time that the processor
spends on this process: what else the machine does counts for neither. No line, no relay, no waiting for the disk.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from figures import setting, spread

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))


def compared(root: Path, model: Path, name: str, rounds: int, steps: int) -> dict[str, Any]:
    """What the trial predicts, and what rounds of a run then take."""
    from silo_requests import COORDINATOR, TRUSTED, body_of, opened

    from configs.load import load
    from federated.adapters.arrays import to_bytes
    from federated.adapters.warm_model import initial_adapter
    from federated.protocol import silo_pb2 as pb
    from federated.protocol.envelope import seal_request
    from federated.silo.rehearsal.steps import _taken
    from federated.silo.silo import Silo
    from federated.simulation.simulated_places import simulated_silo
    from privacy.plan_from_settings import plan_terms

    overrides = [f"federated.rounds={rounds}", f"federated.local_steps={steps}", "privacy.epsilon=1"]
    config = load("tiny", overrides)
    given = simulated_silo(config, name, model)
    state = given.silo.model_copy(update={"state_dir": str(root / f"{name}-{steps}")})
    policy = given.policy.model_copy(update={"budget_epsilon": 100.0})
    given = given.model_copy(update={"silo": state, "policy": policy})
    silo, plan = Silo(given, TRUSTED), plan_terms(config)
    train = {
        "plan_digest": plan.digest,
        "base_model_digest": silo.workbench.base_model.content_digest,
        "task": "causal",
        "adapter_spec": pb.AdapterSpec(rank=config.federated.lora_rank, alpha=config.federated.lora_alpha),
        "adapter": to_bytes(initial_adapter(config, model)),
        "learning_rate": 0.01,
        "optimizer": "adam",
    }
    asked = {"config": given.model_dump(mode="json"), "plan": plan.model_dump(mode="json")}
    trial = _taken(asked, pb.Train(round=1, **train).SerializeToString())
    predicted = trial["prepare_seconds"] + steps * trial["step_seconds"]

    def ask(request_id: str, **kind: Any) -> float:
        body = body_of(request_id, "run-1", silo_id=name, **kind)
        began = time.perf_counter()
        reply = opened(silo.handle(seal_request(COORDINATOR, body)), silo)
        if reply.WhichOneof("kind") not in ("reserved", "trained"):
            raise SystemExit(f"{request_id}: {reply}")
        return time.perf_counter() - began

    ask("reserve", reserve=pb.Reserve(plan=plan.model_dump_json()))
    seconds = [ask(f"round-{number}", train=pb.Train(round=number, **train)) for number in range(1, rounds + 1)]
    silo.close()
    first = sum(seconds) - rounds * median(seconds)
    return {
        "predicted": {"round": predicted, "once in a run": trial["first_seconds"]},
        "measured": {"round": spread(seconds), "beyond so many medians": first},
        "predicted over measured": predicted / median(seconds),
        "of the whole run": (trial["first_seconds"] + rounds * predicted) / sum(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="exported models, as runs/tiny/model")
    parser.add_argument("--silo", nargs="+", default=["histories"], help="of the plays: comedies, histories and others")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, nargs="+", default=[2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    time.perf_counter = time.process_time
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="rehearsal-steps-") as root:
        for number, model in enumerate(options.model, 1):
            for name in options.silo:
                for steps in options.steps:
                    label = f"model {number}, {name}, {steps} steps"
                    folder = Path(root) / str(number)
                    found[label] = compared(folder, model.absolute(), name, options.rounds, steps)
                    print(label, json.dumps(found[label]), file=sys.stderr)
    ratios = [one["predicted over measured"] for one in found.values()]
    result = {**setting(["siloweave", "torch"]), "predicted over measured": spread(ratios), "each": found}
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
