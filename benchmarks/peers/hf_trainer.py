"""Hugging Face Trainer with DeepSpeed:

torchrun --standalone --nproc-per-node 2 benchmarks/peers/hf_trainer.py WORK RECORD

Its stock settings train every rank on the same batches where there is no GPU: accelerate then finds no backend, takes
itself for the only process, and nothing fails. So accelerate's state is made here, with gloo, and handed over by
``use_configured_state``; that the ranks share the batch is seen in the losses, which are the other peers'.
"""

import os
import sys
from pathlib import Path
from typing import Any

from work import Record, Work, skip_compilation


def main() -> None:
    work, record = Work(Path(sys.argv[1])), Record(Path(sys.argv[2]), int(os.environ["RANK"]))
    record.mark("started")
    import deepspeed  # noqa: F401
    import torch
    from accelerate import PartialState
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Recorder(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            record.mark("built")

        def on_log(self, _: Any, state: Any, __: Any, logs: Any = None, **___: Any) -> None:
            if "loss" in logs:
                record.step(state.global_step, float(logs["loss"]))

    class OurTrainer(Trainer):
        # With DeepSpeed it passes over the argument ``optimizers``.
        def create_optimizer(self, model: Any = None) -> Any:
            if self.optimizer is None:
                self.optimizer = self.plain_optimizer = work.new_optimizer(model or self.model)
            return self.optimizer

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:  # noqa: ARG002
            rates, last = work.learning_rates, num_training_steps - 1
            # On torch's own optimizer: the one around it is DeepSpeed's by now.
            self.lr_scheduler = LambdaLR(self.plain_optimizer, lambda step: rates[min(step, last)] / rates[0])
            return self.lr_scheduler

    torch.set_num_threads(1)
    record.mark("imported")
    skip_compilation()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    state = PartialState(backend="gloo")
    record.mark("joined")
    world_size = state.num_processes
    arguments = TrainingArguments(
        output_dir=str(work.folder / "hf"),
        accelerator_config={"use_configured_state": True},
        deepspeed=work.deepspeed,
        max_steps=work.steps,
        per_device_train_batch_size=work.micro_batch_size,
        gradient_accumulation_steps=work.batch_size // (work.micro_batch_size * world_size),
        max_grad_norm=work.deepspeed["gradient_clipping"],
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=work.seed,
        train_sampling_strategy="sequential",
    )
    if arguments.world_size != world_size:
        raise RuntimeError(f"the Trainer sees {arguments.world_size} ranks of {world_size}")
    OurTrainer(model=work.new_model(), args=arguments, train_dataset=Windows(work), callbacks=[Recorder()]).train()


class Windows:
    """The windows one by one, in the order of the steps."""

    def __init__(self, work: Work) -> None:
        self._windows = work.windows.reshape(-1, work.windows.shape[-1])

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        tokens = torch.from_numpy(self._windows[index].astype("int64"))
        return {"input_ids": tokens, "labels": tokens}


if __name__ == "__main__":
    main()
