"""What a step achieved: tokens and floating-point operations per second, their share of the peak, and memory.

Operations are the model's own: two per weight and token forward, four backward, and attention's two matrix products
(Chowdhery et al. 2022, PaLM, appendix B; the 6 N D of Hoffmann et al. 2022, Chinchilla, appendix F, with its attention
term). What is done twice, as activation checkpointing does, is not counted twice. Where an encoder and a decoder share
the work, or where the architecture is anyone's, torch counts them on a model without values.
"""

import resource
from typing import Any

from configs.schema.schema import RunConfig
from trainer.rank import Rank

# Dense bf16 FLOP/s by a part of torch.cuda.get_device_name(), from the vendor's data sheets (without sparsity); the
# first that fits counts.
PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
}


def matmul_parameters(model: Any) -> int:
    """Number of weights that every token is multiplied with: all matrices, but for embeddings that are looked up only.

    Sharded weights (ZeRO-3) count whole; an output head that shares the embedding's weight counts once.
    """
    import torch

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    looked_up = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and (head is None or module.weight is not head.weight)
    }
    return sum(
        int(getattr(weight, "ds_numel", weight.numel()))
        for weight in model.parameters()
        if id(weight) not in looked_up and len(getattr(weight, "ds_shape", weight.shape)) >= 2
    )


def flops_per_token(model: Any, context_length: int) -> float:
    """Operations of forward and backward for one token of a sequence of ``context_length``: 6 N + 12 L H T.

    The masked half of a causal attention matrix counts too, as in the PaLM paper and most figures that people compare
    with. A model without attention has no second term.
    """
    settings = getattr(model, "config", None)
    layers = getattr(settings, "num_hidden_layers", 0) if getattr(settings, "num_attention_heads", 0) else 0
    width = getattr(settings, "hidden_size", 0)
    return 6.0 * matmul_parameters(model) + 12.0 * layers * width * context_length


def counted_flops(config: RunConfig, vocab_size: int, context_length: int) -> float | None:
    """Operations of forward and backward for one token of a window, as torch counts them; None where it can't."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from trainer.models.families import empty_model
    from trainer.objectives.span_corruption import lengths

    names = {"input_ids": context_length}
    if config.objective == "span_corruption":
        names = dict(zip(("input_ids", "decoder_input_ids"), lengths(context_length), strict=True))
    inputs = {name: torch.zeros(1, size, dtype=torch.long, device="meta") for name, size in names.items()}
    try:
        with FlopCounterMode(display=False) as counter:
            empty_model(config.model, vocab_size, config.objective)(**inputs).logits.sum().backward()
    except (RuntimeError, NotImplementedError, ValueError):  # what it computes depends on values, as in a mixture
        return None
    return float(counter.get_total_flops()) / context_length


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak of one device in bf16, or None where it is not known."""
    if precision != "bf16":
        return None
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in device_name.replace("-", " ")), None)


class Throughput:
    """Turns a step's tokens and seconds into what people compare.

    Args:
        model: the module that trains.
        config: the run's settings.
        rank: this process; all ranks share a step.
    """

    def __init__(self, model: Any, config: RunConfig, rank: Rank) -> None:
        import psutil
        import torch

        lengths = {stage.context_length for stage in config.stages}
        self._flops_per_token: dict[int, float | None]
        if config.model.config or config.objective == "span_corruption":
            size = model.config.get_text_config().vocab_size
            self._flops_per_token = {length: counted_flops(config, size, length) for length in lengths}
        else:
            self._flops_per_token = {length: flops_per_token(model, length) for length in lengths}
        self._cuda: Any = torch.cuda if rank.device == "cuda" else None
        peak = peak_flops(self._cuda.get_device_name(), config.pretrain.precision) if self._cuda else None
        self._peak = peak and peak * rank.world_size
        self._process = psutil.Process()

    def figures(self, tokens: int, context_length: int, seconds: float) -> dict[str, float | int | None]:
        """A step's rates over all ranks, and this rank's memory.

        Args:
            tokens: of the step.
            context_length: of its sequences.
            seconds: that it took.

        Returns:
            ``gflop_per_s`` (None where operations can't be counted); ``mfu``, the share of the devices' peak (None
            where that is not known);
            ``memory_bytes`` and ``peak_memory_bytes``, resident in this rank's process; ``gpu_memory_bytes``, the most
            that was allocated on its GPU (None on a CPU).
        """
        flops = self._flops_per_token[context_length]
        achieved = flops * tokens / seconds if flops is not None else None
        resident = self._process.memory_info().rss
        return {
            "gflop_per_s": None if achieved is None else achieved / 1e9,
            "mfu": achieved / self._peak if achieved is not None and self._peak else None,
            "memory_bytes": resident,
            "peak_memory_bytes": max(resident, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
            "gpu_memory_bytes": self._cuda.max_memory_allocated() if self._cuda else None,
        }
