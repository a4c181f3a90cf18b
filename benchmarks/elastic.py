"""The largest deviation of a loss when the number of ranks changes, and seconds of a resize and of its conversion.

python benchmarks/elastic.py --stages 1 2 3 --repetitions 3 --json elastic.json

The tiny model goes through 1, 2, 4 and 2 ranks, killed after each, against one rank that nothing happens to. A resize
is a cold start with other ranks: seconds from then to the first completed step; the conversion is a part of it.
DeepSpeed's own converter is timed beside it on a commit of two ranks (in this process, imports done, with one worker
and with its default of four); its ranks would read its output afterwards, which is not in its time and is in ours.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from figures import setting, spread

RANKS = (1, 2, 4, 2)


def overrides(folder: str, stage: int, given: Sequence[str]) -> Iterator[str]:
    """The tiny preset for up to four ranks."""
    yield f'run.storage="{folder}"'
    yield f"pretrain.zero_stage={stage}"
    yield "pretrain.micro_batch_size=1"
    yield from given


def legs(stage: int, repetitions: int, given: Sequence[str]) -> dict[str, Any]:
    """The chain, again and again, and DeepSpeed's converter after each."""
    from cluster.checks.verify_resume import verify_resume
    from configs.load import load
    from trainer.data.prepare import prepare

    chains, universal = [], []
    with tempfile.TemporaryDirectory() as folder:
        config = load("tiny", list(overrides(folder, stage, given)))
        directory = Path(folder) / "tiny"
        prepare(config, directory, None)
        two_ranks(config, directory)
        commit = max((directory / "pretrain" / "checkpoints").glob("step-*"))
        for repetition in range(repetitions):
            chains.append(verify_resume(config, directory, lambda _: None, RANKS))
            print(f"  stage {stage}: {chains[-1]['largest_deviation']:.1e}", file=sys.stderr)
            universal.append([convert(commit, Path(folder) / f"universal-{repetition}-{n}", workers=n) for n in (1, 4)])
    resizes = [leg for chain in chains for leg in chain["legs"] if leg["convert_s"] is not None]
    starts = [leg for chain in chains for leg in chain["legs"] if leg["convert_s"] is None]
    return {
        "largest_deviation": max(chain["largest_deviation"] for chain in chains),
        "start_of_one_rank_s": spread([leg["start_s"] for leg in starts]),
        "resize_s": spread([leg["start_s"] for leg in resizes]),
        "convert_s": spread([leg["convert_s"] for leg in resizes]),
        "deepspeed_converter_one_worker_s": spread([one for one, _ in universal]),
        "deepspeed_converter_four_workers_s": spread([four for _, four in universal]),
        "chains": chains,
    }


def two_ranks(config: Any, directory: Path) -> None:
    """A commit to convert."""
    from cluster.runtime.gang import run_gang

    steps = {"steps": 8, "commit_every": 8, "validate_every": 8}
    short = config.model_copy(update={"pretrain": config.pretrain.model_copy(update=steps)})
    run_gang(short, directory, lambda _: None)


def convert(commit: Path, target: Path, *, workers: int) -> float:
    """Seconds of DeepSpeed's converter."""
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(commit),
        output_folder=str(target),
        num_extract_workers=workers,
        num_merge_workers=min(workers, 2),
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, nargs="+", default=[2])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--set", dest="given", action="append", default=[], help="a setting of the run")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from cluster.runtime.session import ray_session
    from configs.load import load

    with ray_session(load("tiny").cluster, max(RANKS)):
        figures = {str(stage): legs(stage, arguments.repetitions, arguments.given) for stage in arguments.stages}
    document = {
        **setting(("ray", "torch", "deepspeed", "transformers")),
        "repetitions": arguments.repetitions,
        "ranks": RANKS,
        "settings": arguments.given,
        "figures": figures,
    }
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    for stage, group in figures.items():
        print(f"stage {stage}: largest deviation {group['largest_deviation']:.1e}")
        for part, value in group.items():
            if isinstance(value, dict):
                print(f"  {part}: {value['median']:.3g} ({value['minimum']:.3g} to {value['maximum']:.3g})")


if __name__ == "__main__":
    main()
