"""Share of a private step that its noise takes, for LoRA and for a whole model; the straightforward way beside it.

python benchmarks/noise.py --json noise.json
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from figures import setting, spread
from transformers import LlamaConfig, LlamaForCausalLM

from privacy.mechanism.dp_sgd import PrivateTraining
from privacy.mechanism.noise import grid, noised
from privacy.mechanism.streams import Streams
from privacy.plan import PlanTerms
from trainer.models.adapters import add_adapter

BATCH, CONTEXT, VOCABULARY, PUBLIC_COUNT = 16, 128, 2048, 1000
# Every unit is in nearly every batch, so that a step has 16 records.
PLAN = PlanTerms(
    sampling_rate=0.999, max_grad_norm=1.0, noise_multiplier=1.0, rounds=1, steps_per_round=1, delta=1e-5
).bind(PUBLIC_COUNT)
DIGEST = "11" * 32


def model(lora: bool) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    )
    plain = LlamaForCausalLM(config)
    return add_adapter(plain, 8, 16.0, seed=0) if lora else plain


def straightforward(
    clipped_sum: torch.Tensor, noise_std: float, streams: Streams, step: int, name: str
) -> torch.Tensor:
    """The same distribution, all at once: the baseline."""
    generator = streams.generator("noise", step, name)
    draws: Any = sum(generator.standard_normal(tuple(clipped_sum.shape)) for _ in range(4))
    spacing = grid(noise_std)
    return ((clipped_sum.double() + torch.from_numpy(draws * (noise_std / 2))) / spacing).round().mul(spacing).float()


def losses(net: Any, units: Any) -> torch.Tensor:
    tokens_BT = torch.stack(list(units))
    logits_BTV = net(input_ids=tokens_BT).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), tokens_BT[:, 1:], reduction="none").sum(dim=1)


def whole_step(net: Any, seed: int) -> float:
    """Seconds of one step of the engine, and of its probe, which runs once a charge and is not counted."""
    tokens = list(torch.randint(VOCABULARY, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(seed)))
    optimizer = torch.optim.Adam([value for value in net.parameters() if value.requires_grad], lr=1e-3)
    began = 0.0

    def start(_: Any) -> None:
        nonlocal began
        began = began or time.perf_counter()

    PrivateTraining(
        PLAN,
        net,
        optimizer,
        unit_losses=lambda units: losses(net, units),
        shape_of=start,
        made_up=lambda _, number: torch.randint(VOCABULARY, (number, CONTEXT)).unbind(),
        synthetic=tokens[:2],
    ).run(Streams(seed.to_bytes(32, "little"), DIGEST), [(row,) for row in tokens])
    return time.perf_counter() - began


def noise_alone(net: Any, seed: int, add: Callable[..., torch.Tensor]) -> float:
    streams = Streams(seed.to_bytes(32, "little"), DIGEST)
    parameters = {name: value for name, value in net.named_parameters() if value.requires_grad}
    sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()}
    began = time.perf_counter()
    for name, value in sums.items():
        add(value, PLAN.noise_std, streams, 0, name)
    return time.perf_counter() - began


def measure(repetitions: int) -> dict[str, dict[str, Any]]:
    nets = {"lora": model(lora=True), "full": model(lora=False)}
    seconds: dict[str, list[float]] = {}
    for net in nets.values():
        whole_step(net, 999)  # warm-up
    for seed in range(repetitions):
        for kind, net in nets.items():
            step = whole_step(net, seed)
            noise = noise_alone(net, seed, noised)
            before = noise_alone(net, seed, straightforward)
            for name, value in (("step_s", step), ("noise_s", noise), ("straightforward_noise_s", before)):
                seconds.setdefault(f"{kind}_{name}", []).append(value)
            seconds.setdefault(f"{kind}_noise_share", []).append(noise / step)
    figures: dict[str, dict[str, Any]] = {name: spread(values) for name, values in seconds.items()}
    for kind, net in nets.items():
        figures[f"{kind}_parameters"] = spread([sum(v.numel() for v in net.parameters() if v.requires_grad)])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    figures = measure(arguments.repetitions)
    document = {
        **setting(("torch", "opacus", "numpy", "randomgen")),
        "threads": torch.get_num_threads(),
        "repetitions": arguments.repetitions,
        "figures": figures,
    }
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    for name, value in figures.items():
        print(f"{name}: {value['median']:.4g} ({value['minimum']:.4g} to {value['maximum']:.4g})")


if __name__ == "__main__":
    main()
