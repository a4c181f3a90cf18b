"""All that needs a GPU to be measured, in some minutes: pretraining on one rank, and a private step beside a plain one.

Pretraining is the preset ``gpu`` on one GPU (NCCL, bfloat16): tokens a second, and the share of the GPU's peak (MFU). A
step is timed as in dp_step.py, with LoRA on models of random weights in the sizes of GPT-2 and SmolLM2: plain, our
book-keeping, and Opacus' hooks; beside it how many records are computed together, and how far their clipped sum is from
the processor's.

python benchmarks/gpu.py --json gpu.json
python benchmarks/gpu.py --device cpu --small --json gpu.json       # runs the same code, and says nothing of a GPU
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from dp_step import MAX_GRAD_NORM, Workload, causal, step_of
from figures import setting, spread
from workload import environment, steps_of

from privacy.clipping.clipping import clipping
from privacy.clipping.independence import Together
from trainer.device import device_of, name_of
from trainer.models.adapters import add_adapter

MODES = ("bookkeeping", "hooks")
SIZES = {
    "gpt2": {"vocab_size": 50257, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "smollm2": {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9},
}
SMALL = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
STEPS = {"gpu": 60, "tiny": 8}


def workload(name: str, device: torch.device, *, small: bool) -> Workload:
    """A model of random weights with LoRA, and records, both drawn by the processor."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = SMALL if small else SIZES[name]
    config = LlamaConfig(
        intermediate_size=4 * sizes["hidden_size"], max_position_embeddings=512, use_cache=False,
        tie_word_embeddings=True, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = add_adapter(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), 8, 16.0, seed=0)
    return causal(model.train().to(device), sizes["vocab_size"], 16, 32 if small else 256)


def seconds(step: Any, device: torch.device) -> float:
    """Of a step, until the GPU has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def steps(name: str, device: torch.device, repetitions: int, *, small: bool) -> dict[str, Any]:
    """Seconds of a plain step, and what a private one takes, divided by the plain ones before and after it."""
    plain = step_of("plain", workload(name, device, small=small))
    private = {mode: step_of(mode, workload(name, device, small=small)) for mode in MODES}
    for step in (plain, *private.values()) * 2:
        step()
    ratios, plains = {mode: list[float]() for mode in private}, list[float]()
    for _ in range(repetitions):
        for mode, step in private.items():
            before, between, after = (seconds(one, device) for one in (plain, step, plain))
            ratios[mode].append(2 * between / (before + after))
            plains += [before, after]
    return {
        "plain_step_seconds": spread(plains),
        "step_over_plain": {mode: spread(values) for mode, values in ratios.items()},
    }


def clipped_sum(made: Workload) -> tuple[torch.Tensor, int]:
    """The sum of clipped gradients as one vector, and how many records were computed together."""
    records = made.records

    def losses(chosen: Any) -> torch.Tensor:
        return made.losses(made.model, chosen)

    with clipping(made.model, MAX_GRAD_NORM) as clipper:
        together = Together(clipper, losses, lambda _: None, lambda _, size: range(records, records + size), 16)
        proved = together.proved(None)
        for units in together.cut(range(records)):
            clipper.accumulate(losses, units)
        return torch.cat([value.cpu().flatten() for value in clipper.take().values()]), proved


def difference(name: str, device: torch.device, *, small: bool) -> dict[str, float]:
    """How far a clipped sum is from the processor's, relative to its length."""
    (here, _), (there, proved) = (
        clipped_sum(workload(name, where, small=small)) for where in (torch.device("cpu"), device)
    )
    return {"difference": float((there - here).norm() / here.norm()), "together": proved}


def pretraining(device: torch.device) -> dict[str, Any]:
    """Tokens a second and MFU of one rank, in steady state."""
    preset = "gpu" if device.type == "cuda" else "tiny"
    settings = ["cluster.world_size=1", f"pretrain.steps={STEPS[preset]}", "pretrain.warmup_steps=2", "run.name=gpu"]
    settings += ["pretrain.batch_size=64"] if preset == "gpu" else []
    with tempfile.TemporaryDirectory() as folder:
        overrides = [word for one in (*settings, f"run.storage={folder}") for word in ("--set", one)]
        program = str(Path(sys.executable).with_name("siloweave"))
        for stage in ("prepare", "pretrain"):
            subprocess.run(
                [program, stage, "-c", preset, *overrides],
                env=environment() if device.type == "cpu" else None,
                cwd=folder,
                check=True,
                capture_output=True,
            )
        events = (Path(folder) / "gpu" / "events.jsonl").read_text().splitlines()
    found = list(steps_of([json.loads(line) for line in events]).values())[STEPS[preset] // 2 :]
    shares = [step["mfu"] for step in found if step.get("mfu") is not None]
    return {
        "preset": preset,
        "tokens_per_s": spread([step["tokens"] / step["seconds"] for step in found]),
        "mfu": spread(shares) if shares else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="as silo.device")
    parser.add_argument("--small", action="store_true", help="tiny models: to run this script's own code")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1 if arguments.device == "cpu" else torch.get_num_threads())
    device = device_of(arguments.device)
    document: dict[str, Any] = {**setting(("torch", "opacus", "transformers", "peft")), "device": name_of(device)}
    for name in SIZES:
        figures = difference(name, device, small=arguments.small)
        document[name] = {**figures, **steps(name, device, arguments.repetitions, small=arguments.small)}
        print(f"{name}: {json.dumps(document[name])}", flush=True)
    document["pretraining"] = pretraining(device)
    print(f"pretraining: {json.dumps(document['pretraining'])}")
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
