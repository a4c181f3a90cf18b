"""A commit of one number of ranks, loaded by another: every rank takes its share of each parameter's state.

ZeRO cuts the flattened optimizer state into one partition per rank. Which parts of which parameter lie where follows
from the number of ranks alone, so the ranks of another number read their parts straight out of the old shards and hand
DeepSpeed the state that a commit of their own number would hold. Nothing is converted on disk: no copy in the clear
beside an encrypted run, and nothing to clean up. An optimizer's state may be one value per element, or one for all.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import SiloweaveError

Read = Callable[[Path], Any]
_WEIGHTS = "fp32"


@dataclass(frozen=True)
class Piece:
    """A stretch of one parameter inside a flat partition.

    Attributes:
        name: the parameter.
        group: which of the rank's flat partitions.
        start: first element in the partition.
        offset: first element in the flattened parameter.
        numel: number of elements.
    """

    name: str
    group: int
    start: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Shard:
    """What one rank committed.

    Attributes:
        pieces: what lies where.
        states: for each group, flat tensors by name (``fp32`` and the optimizer's).
        scalars: for each group, the optimizer's other values (its step).
        content: the optimizer state as DeepSpeed saved it.
    """

    pieces: list[Piece]
    states: list[dict[str, Any]]
    scalars: list[dict[str, Any]]
    content: dict[str, Any]


def load_resized(engine: Any, directory: Path, saved_world_size: int, read: Read) -> None:
    """Loads a commit that another number of ranks wrote. Every rank calls it.

    Args:
        engine: a fresh DeepSpeed engine with ZeRO stage 1, 2 or 3.
        directory: the commit; its digests hold.
        saved_world_size: how many ranks wrote it.
        read: reads one of its files.

    Raises:
        SiloweaveError: the commit lacks a part of this rank's state.
    """
    stage = engine.zero_optimization_stage()
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    common = read(directory / f"{prefix}mp_rank_00_model_states.pt")
    module = common["module"]
    if stage == 3:  # parameters come from the optimizer's float32 copies; buffers are whole on every rank
        buffers = {name for name, _ in engine.module.named_buffers()}
        module = {name: value for name, value in module.items() if name in buffers}
        engine.optimizer.checkpoint_event_prologue()
    engine.load_module_state_dict({"module": module}, strict=stage != 3)
    shards = saved_shards(directory, stage, saved_world_size, read)
    own = _Stage3(engine.optimizer) if stage == 3 else _Stage12(engine.optimizer)
    mine = own.as_saved(*collect(own.pieces(), own.sizes(), shards, directory))
    engine.optimizer.load_state_dict(state_dict_list=[mine] * engine.dp_world_size, load_from_fp32_weights=True)
    if stage == 3:
        engine.optimizer.checkpoint_event_epilogue()
    engine.global_steps, engine.global_samples = common["global_steps"], common["global_samples"]
    engine.skipped_steps = common["skipped_steps"]


def saved_shards(directory: Path, stage: int, world_size: int, read: Read) -> Iterator[Shard]:
    """What the ranks of a commit with ZeRO stage 1, 2 or 3 saved, in their order."""
    numels: list[dict[str, int]] = []
    if stage == 3:
        shapes = read(directory / "zero_pp_rank_0_mp_rank_00_model_states.pt")["param_shapes"]
        numels = [{name: shape.numel() for name, shape in group.items()} for group in shapes]
    seen: dict[str, int] = defaultdict(int)
    for rank in range(world_size):
        content = read(_optimizer_file(directory, rank))["optimizer_state_dict"]
        if stage == 3:
            weights, state = content["fp32_flat_groups"], content["optimizer_state_dict"]["state"]
            pieces = list(equal_parts(numels, rank, world_size))
        else:
            weights, state = content["single_partition_of_fp32_groups"], content["base_optimizer_state"]["state"]
            pieces = list(_following(content["param_slice_mappings"], seen))
        split = [_split(state.get(group, {})) for group in range(len(weights))]
        states = [{_WEIGHTS: flat, **own} for flat, (own, _) in zip(weights, split, strict=True)]
        yield Shard(pieces, states, [others for _, others in split], content)


def _following(mappings: list[dict[str, Any]], seen: dict[str, int]) -> Iterator[Piece]:
    """ZeRO-1's and 2's layout: a rank's pieces begin where those of the ranks before it ended."""
    for group, mapping in enumerate(mappings):
        for name, address in mapping.items():
            yield Piece(name, group, address.start, seen[name], address.numel)
            seen[name] += address.numel


def _optimizer_file(directory: Path, rank: int) -> Path:
    name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    bf16 = directory / f"bf16_{name}"
    return bf16 if bf16.exists() else directory / name


def collect(
    wanted: list[Piece], sizes: list[int], shards: Iterator[Shard], directory: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Copies this rank's pieces out of the shards; one shard is in memory at a time.

    Args:
        wanted: what this rank's flat partitions hold.
        sizes: elements of each of its flat partitions, padding included.
        shards: the old ranks', in order.
        directory: where they lie, for messages.

    Returns:
        Flat tensors by group and name, other values by group and name, and the first shard's content.

    Raises:
        SiloweaveError: an element of a wanted piece was in no shard.
    """
    import torch

    by_name: dict[str, list[Piece]] = defaultdict(list)
    for piece in wanted:
        by_name[piece.name].append(piece)
    states: list[dict[str, Any]] = [{} for _ in sizes]
    scalars: list[dict[str, Any]] = [{} for _ in sizes]
    copied: dict[tuple[int, str], int] = defaultdict(int)
    content: dict[str, Any] = {}
    for shard in shards:
        content = content or shard.content
        for source in shard.pieces:
            for target in by_name[source.name]:
                scalars[target.group].update(shard.scalars[source.group])
                first = max(source.offset, target.offset)
                count = max(0, min(source.offset + source.numel, target.offset + target.numel) - first)
                for key, value in shard.states[source.group].items():
                    if key not in states[target.group]:
                        states[target.group][key] = torch.zeros(sizes[target.group], dtype=value.dtype)
                    copied[target.group, key] += count
                    if count:
                        there = value.narrow(0, source.start + first - source.offset, count)
                        states[target.group][key].narrow(0, target.start + first - target.offset, count).copy_(there)
    for (group, key), count in copied.items():
        expected = sum(piece.numel for piece in wanted if piece.group == group)
        if count != expected:
            raise SiloweaveError(f"{directory}: holds {count} of {expected} elements of {key} in group {group}")
    return states, scalars, content


def _split(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """An optimizer's state of one flat partition: what has a value per element, and what has one for all."""
    import torch

    flat = {key: value for key, value in state.items() if torch.is_tensor(value) and value.ndim == 1}
    # Clones: the file may be mapped into memory, and is closed after the load.
    others = {key: value.clone() if torch.is_tensor(value) else value for key, value in state.items()}
    return flat, {key: value for key, value in others.items() if key not in flat}


class _Stage12:
    """One flat partition per parameter group; a parameter may be cut anywhere."""

    def __init__(self, optimizer: Any) -> None:
        if not hasattr(optimizer, "round_robin_bit16_padding"):  # DeepSpeed has another class for some settings
            raise SiloweaveError(
                f"DeepSpeed's {type(optimizer).__name__}: its commits can't be loaded by another number of ranks; set "
                "cluster.world_size to the number that wrote them, or pretrain.zero_stage = 2 for a new run"
            )
        self._optimizer = optimizer

    def sizes(self) -> list[int]:
        return [flat.numel() for flat in self._optimizer.single_partition_of_fp32_groups]

    def pieces(self) -> list[Piece]:
        found = []
        for group, parameters in enumerate(self._optimizer.bit16_groups):
            for parameter in parameters:
                name, mapping = self._optimizer.param_names[parameter], parameter._hp_mapping
                if mapping is None:  # other ranks have all of it; a partition may be nothing but padding
                    found.append(Piece(name, group, 0, 0, 0))
                else:
                    here, within = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
                    found.append(Piece(name, group, here.start, within.start, here.numel))
        return found

    def as_saved(
        self, states: list[dict[str, Any]], scalars: list[dict[str, Any]], content: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            **content,
            "single_partition_of_fp32_groups": [state.pop(_WEIGHTS) for state in states],
            "base_optimizer_state": {**content["base_optimizer_state"], "state": _numbered(states, scalars)},
            # There is no padding between parameters; what DeepSpeed adds at a partition's end depends on the size.
            "param_alignment_paddings": self._optimizer.round_robin_bit16_padding,
        }


class _Stage3:
    """Every parameter is cut into equal parts; a flat partition holds this rank's part of each."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def sizes(self) -> list[int]:
        return [flat.numel() for flat in self._optimizer.fp32_partitioned_groups_flat]

    def pieces(self) -> list[Piece]:
        from torch import distributed

        names = self._optimizer.param_names
        groups = [{names[value]: value.ds_numel for value in group} for group in self._optimizer.fp16_groups]
        return list(equal_parts(groups, distributed.get_rank(), distributed.get_world_size()))

    def as_saved(
        self, states: list[dict[str, Any]], scalars: list[dict[str, Any]], content: dict[str, Any]
    ) -> dict[str, Any]:
        owners = self._optimizer.sub_group_to_group_id
        settings = [
            {**group, "params": [sub for sub in range(len(states)) if owners[sub] == index]}
            for index, group in enumerate(content["optimizer_state_dict"]["param_groups"])
        ]
        weights = [state.pop(_WEIGHTS) for state in states]
        optimizer_state = {"state": _numbered(states, scalars), "param_groups": settings}
        return {**content, "fp32_flat_groups": weights, "optimizer_state_dict": optimizer_state}


def equal_parts(groups: list[dict[str, int]], rank: int, world_size: int) -> Iterator[Piece]:
    """ZeRO-3's layout: for each group of parameters' sizes, this rank's part of each, one after the other."""
    for group, numels in enumerate(groups):
        start = 0
        for name, numel in numels.items():
            part = -(-numel // world_size)
            yield Piece(name, group, start, rank * part, max(0, min(part, numel - rank * part)))
            start += part


def _numbered(states: list[dict[str, Any]], scalars: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """As torch's optimizers save it; a group without any state (plain SGD) is left out."""
    both = ({**state, **others} for state, others in zip(states, scalars, strict=True))
    return {group: state for group, state in enumerate(both) if state}
