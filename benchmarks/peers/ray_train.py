"""The plain loop on Ray Train's workers (TorchTrainer, v2):

python benchmarks/peers/ray_train.py WORK RECORD [--commit-every N --max-failures M]

With ``--commit-every`` every rank's DeepSpeed shards are reported as a checkpoint, and a worker that fails is started
again from the newest.
"""

import argparse
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from work import Record, Work
from zero_loop import train

REPORT_EVERY = 10  # every step would cost a meeting of the workers each


def worker(settings: dict[str, Any]) -> None:
    import ray.train
    from ray.train import Checkpoint

    context = ray.train.get_context()
    work, commit_every = Work(Path(settings["work"])), settings["commit_every"]
    record = Record(Path(settings["record"]), context.get_world_rank())
    Record(Path(settings["record"])).worker()
    record.mark("worker")

    def resume(engine: Any) -> int:
        checkpoint = ray.train.get_checkpoint() if commit_every else None
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            _, state = engine.load_checkpoint(folder, tag="latest")
        return int(state["step"])

    def report(engine: Any, done: int, loss: float) -> None:
        if commit_every and done % commit_every == 0:
            with tempfile.TemporaryDirectory() as folder:
                engine.save_checkpoint(folder, tag="latest", client_state={"step": done}, save_latest=False)
                ray.train.report({"loss": loss, "step": done}, checkpoint=Checkpoint.from_directory(folder))
        elif done % REPORT_EVERY == 0:
            ray.train.report({"loss": loss, "step": done})

    train(work, record, before=resume, after=report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("--commit-every", type=int, default=0)
    parser.add_argument("--max-failures", type=int, default=0)
    arguments = parser.parse_args()
    record = Record(arguments.record)
    record.mark("started")
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    record.mark("driver imported")
    world_size = 2
    ray.init(
        address="local",
        num_cpus=world_size + 1,  # Ray Train's controller has one
        include_dashboard=False,
        object_store_memory=256 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    record.mark("ray")
    TorchTrainer(
        worker,
        train_loop_config={
            "work": str(arguments.work.resolve()),
            "record": str(arguments.record.resolve()),
            "commit_every": arguments.commit_every,
        },
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=world_size),
        run_config=RunConfig(
            name="peer",
            storage_path=str(arguments.work.resolve() / "ray-train"),
            failure_config=FailureConfig(max_failures=arguments.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    ).fit()
    ray.shutdown()


if __name__ == "__main__":
    main()
