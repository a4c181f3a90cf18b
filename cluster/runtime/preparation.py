"""Preparation of a large corpus on Ray Data: its parts are cleaned and tokenised by tasks, on all nodes."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from configs.errors import SiloweaveError


def ray_map(function: Callable[[int], object], numbers: Sequence[int]) -> Iterator[int]:
    """``MapParts`` on the connected Ray, with one task per part; the parts' folder must be shared by all nodes.

    Raises:
        SiloweaveError: the function said what is wrong; parts that are done stay done.
    """
    import ray

    if not numbers:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.log_internal_stack_trace_to_stdout = False
    parts = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
    for row in parts.map(_Task(function)).iter_rows():
        if row["error"]:
            raise SiloweaveError(row["error"])
        yield int(row["number"])


class _Task:
    def __init__(self, function: Callable[[int], object]) -> None:
        self._function = function

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one core
        try:
            self._function(row["number"])
        except SiloweaveError as error:  # raised, it would come back inside Ray's own errors, without its cause
            return {**row, "error": str(error)}
        return {**row, "error": ""}
