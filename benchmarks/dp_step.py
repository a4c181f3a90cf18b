"""What a record-level private step costs beside the plain one: our book-keeping and every mode of Opacus.

Book-keeping has oneDNN's linear layers, as silos have where MKL holds back, and once more torch's own, as all others.
One thread. Every private step is timed between two plain steps and divided by their mean; the order of the modes is
drawn anew each time. A step is forward, backward, clipping and optimizer; noise is left out everywhere (see noise.py).
Peak memory (VmHWM) is taken in a process of its own for every mode.

Models of others come in where their folders are given: MiniLM as a classifier, SmolLM2 with tied embeddings.

python benchmarks/dp_step.py --json dp_step.json
python benchmarks/dp_step.py --minilm FOLDER --smollm2 FOLDER --only minilm smollm2 --json dp_step_real.json
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from figures import setting, spread
from torch.nn import functional

MAX_GRAD_NORM = 1.0
LEARNING_RATE = 1e-3
OPACUS = ("hooks", "functorch", "ew", "ghost")
MODES = ("bookkeeping", "bookkeeping_mkl", *OPACUS)
Step = Callable[[], None]


@dataclass
class Workload:
    """A model and a batch. ``losses(call, records)`` gives records' losses; ``call`` is the model or a wrapper of it.

    ``ids`` are those that train; others, for the proof that records may be computed together, follow them.
    """

    model: Any
    records: int
    losses: Callable[..., torch.Tensor]


def causal(model: Any, vocab_size: int, records: int, tokens: int) -> Workload:
    all_ids = torch.randint(vocab_size, (2 * records, tokens))

    def losses(call: Any, chosen: Sequence[int]) -> torch.Tensor:
        ids = all_ids[list(chosen)].to(next(model.parameters()).device)
        logits_BTV = call(ids).logits
        return (
            functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            .view(len(ids), -1)
            .mean(1)
        )

    return Workload(model, records, losses)


def llama(**sizes: int) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(tie_word_embeddings=False, use_cache=False, max_position_embeddings=128, **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def lora_llama(_: Path) -> Workload:
    from peft import LoraConfig, get_peft_model

    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 688}
    model = llama(vocab_size=2048, **sizes)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return causal(get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets)), 2048, 16, 128)


def full_llama(_: Path) -> Workload:
    """The shape of the 260k-parameter stories model."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4}
    return causal(llama(vocab_size=512, intermediate_size=172, **sizes), 512, 32, 128)


def bert(_: Path) -> Workload:
    from transformers import AutoModelForSequenceClassification, BertConfig

    config = BertConfig(
        vocab_size=4096, hidden_size=192, num_hidden_layers=4, num_attention_heads=6, intermediate_size=768,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=4,
    )  # fmt: skip
    return classifier(AutoModelForSequenceClassification.from_config(config, attn_implementation="eager"), 4096, 4)


def classifier(model: Any, vocab_size: int, classes: int) -> Workload:
    all_ids, labels = torch.randint(vocab_size, (64, 64)), torch.randint(classes, (64,))

    def losses(call: Any, chosen: Sequence[int]) -> torch.Tensor:
        ids = all_ids[list(chosen)]
        # Opacus can't take the broadcast position ids that transformers makes by itself.
        positions = torch.arange(64).expand(len(ids), -1).contiguous()
        logits = call(ids, position_ids=positions, token_type_ids=torch.zeros_like(ids)).logits
        return functional.cross_entropy(logits, labels[list(chosen)], reduction="none")

    return Workload(model, 32, losses)


def minilm(folder: Path) -> Workload:
    """Two labels; LoRA r=8 on all linear layers, and the head as a whole."""
    from trainer.data.tokenizer import load_tokenizer
    from trainer.models.adapters import Adaptation, adapted
    from trainer.models.load import Head, load_model

    head = Head("classification", 2, load_tokenizer(folder).pad_token_id, ("negative", "positive"))
    model = adapted(load_model(folder, head=head), Adaptation(8, 16.0, head=head), 0)
    return classifier(model, model.config.vocab_size, 2)


def smollm2(folder: Path) -> Workload:
    """LoRA r=8 on all linear layers: the output head, whose weight is the embedding's, has none."""
    from trainer.models.adapters import add_adapter
    from trainer.models.load import load_model

    model = add_adapter(load_model(folder), 8, 16.0, seed=0)
    return causal(model, model.config.vocab_size, 8, 128)


WORKLOADS = {
    "lora_llama": lora_llama,
    "full_llama": full_llama,
    "full_bert": bert,
    "minilm": minilm,
    "smollm2": smollm2,
}
FOLDERS: dict[str, Path] = {}


def build(name: str) -> Workload:
    torch.manual_seed(0)
    workload = WORKLOADS[name](FOLDERS.get(name, Path()))
    workload.model.train()
    return workload


def trainable(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step_of(mode: str, workload: Workload) -> Step:
    """One training step, as a user of that mode writes it."""
    if mode == "plain":
        optimizer = torch.optim.SGD(trainable(workload.model), lr=LEARNING_RATE)

        def plain() -> None:
            workload.losses(workload.model, range(workload.records)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return plain
    if mode.startswith("bookkeeping"):
        return bookkeeping_step(workload, products=mode == "bookkeeping")
    return opacus_step(mode, workload)


def bookkeeping_step(workload: Workload, *, products: bool) -> Step:
    """As the engine makes it: with the proof, before the first step, of which records may be computed together.

    Args:
        workload: what is trained.
        products: oneDNN's linear layers, as a silo has them where MKL holds back; else torch's own, as all others.
    """
    from privacy.clipping.clipping import clipping
    from privacy.clipping.independence import Together
    from trainer.pretraining.onednn import use_onednn

    model, records = workload.model, workload.records
    if products:
        use_onednn(model)
    optimizer = torch.optim.SGD(trainable(model), lr=LEARNING_RATE)
    parameters = dict(model.named_parameters())
    context = clipping(model, MAX_GRAD_NORM)
    clipper = context.__enter__()

    def losses(chosen: Sequence[int]) -> torch.Tensor:
        return workload.losses(model, chosen)

    together = Together(clipper, losses, lambda _: None, lambda _, size: range(records, records + size), 16)

    def step() -> None:
        for units in together.cut(range(records)):
            clipper.accumulate(losses, units)
        for name, clipped_sum in clipper.take().items():
            parameters[name].grad = clipped_sum.div_(records).float()
        optimizer.step()
        optimizer.zero_grad()

    step.keep = context  # type: ignore[attr-defined]
    step.proved = together  # type: ignore[attr-defined]
    return step


def opacus_step(mode: str, workload: Workload) -> Step:
    from opacus.grad_sample import GradSampleModule, GradSampleModuleExpandedWeights
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping

    model = workload.model
    records = workload.records
    plain = torch.optim.SGD(trainable(model), lr=LEARNING_RATE)
    options = {"noise_multiplier": 0.0, "max_grad_norm": MAX_GRAD_NORM, "expected_batch_size": records}
    if mode == "ghost":
        ghost = GradSampleModuleFastGradientClipping(model, max_grad_norm=MAX_GRAD_NORM, strict=False)
        fast = DPOptimizerFastGradientClipping(plain, **options)

        def two_passes() -> None:  # what opacus.utils.fast_gradient_clipping_utils.DPTensorFastGradientClipping does
            losses = workload.losses(ghost, range(records))
            losses.mean().backward(retain_graph=True)
            fast.zero_grad()
            coefficients = ghost.get_clipping_coef()
            ghost.disable_hooks()
            (coefficients * losses).sum().backward()
            ghost.enable_hooks()
            fast.step()
            fast.zero_grad()

        return two_passes
    if mode == "ew":
        wrapped: Any = GradSampleModuleExpandedWeights(model, loss_reduction="mean")
    else:
        wrapped = GradSampleModule(model, strict=False, force_functorch=mode == "functorch")
    optimizer = DPOptimizer(plain, **options)

    def step() -> None:
        workload.losses(wrapped, range(records)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Step) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def compare(name: str, modes: Sequence[str], repetitions: int) -> dict[str, Any]:
    """Ratios of every mode to the plain steps on either side."""
    plain = step_of("plain", build(name))
    steps, refused = {}, {}
    for mode in modes:
        try:
            step = step_of(mode, build(name))
            step()
            step()
            steps[mode] = step
        except (RuntimeError, NotImplementedError) as error:
            refused[mode] = str(error).splitlines()[0]
    ratios: dict[str, list[float]] = {mode: [] for mode in steps}
    plain_seconds = [seconds(plain), seconds(plain)]
    for _ in range(repetitions):
        for mode in random.sample(list(steps), len(steps)):
            before, between, after = seconds(plain), seconds(steps[mode]), seconds(plain)
            ratios[mode].append(between / ((before + after) / 2))
            plain_seconds += [before, after]
    return {
        "plain_step_seconds": spread(plain_seconds[2:]),
        "step_over_plain": {mode: spread(values) for mode, values in ratios.items()},
        "refused": refused,
    }


def peak_memory(name: str, modes: Sequence[str], repetitions: int) -> dict[str, Any]:
    """VmHWM in MB of a process that takes three steps, by mode, and its ratio to the plain one."""
    peaks: dict[str, list[float]] = {}
    for _ in range(repetitions):
        for mode in ("plain", *modes):
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--peak", name, mode],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode == 0:
                peaks.setdefault(mode, []).append(float(done.stdout.split()[-1]))
    base = statistics.median(peaks["plain"])
    return {
        "peak_megabytes": {mode: spread(values) for mode, values in peaks.items()},
        "peak_over_plain": {mode: statistics.median(values) / base for mode, values in peaks.items()},
    }


def print_peak(name: str, mode: str) -> None:
    step = step_of(mode, build(name))
    for _ in range(3):
        step()
    status = Path("/proc/self/status").read_text()
    print(next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--memory-repetitions", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, help="of the workloads; else all that need no folder")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--minilm", type=Path, help="folder of the model, as `siloweave import` writes it")
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    FOLDERS.update({name: folder for name in ("minilm", "smollm2") if (folder := getattr(arguments, name))})
    if arguments.peak:
        print_peak(*arguments.peak)
        return
    figures: dict[str, Any] = {}
    for name in arguments.only or [name for name in WORKLOADS if name not in ("minilm", "smollm2") or name in FOLDERS]:
        compared = compare(name, arguments.modes, arguments.repetitions)
        figures[name] = {**compared, **peak_memory(name, arguments.modes, arguments.memory_repetitions)}
        show(name, arguments.modes, figures[name])
    document = {
        **setting(("torch", "opacus", "transformers", "peft")),
        "threads": 1,
        "repetitions": arguments.repetitions,
        "figures": figures,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


def show(name: str, modes: Sequence[str], figures: dict[str, Any]) -> None:
    print(f"{name}: plain step {figures['plain_step_seconds']['median'] * 1000:.0f} ms")
    for mode in modes:
        if mode in figures["refused"]:
            print(f"  {mode:<15} refused: {figures['refused'][mode][:90]}")
            continue
        ratio = figures["step_over_plain"][mode]
        peak = figures["peak_over_plain"].get(mode)
        memory = f"   peak memory {peak:.2f}" if peak else ""
        print(f"  {mode:<15} {ratio['median']:.2f} ({ratio['minimum']:.2f} to {ratio['maximum']:.2f}){memory}")


if __name__ == "__main__":
    main()
