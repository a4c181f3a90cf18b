"""A model with a head as an ONNX file, by torch's own exporter; and what onnxruntime makes of it."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from configs.errors import InputError, SiloweaveError, lines_of
from trainer.tasks.qa import tells_parts_apart

TOLERANCE = 1e-4
"""How far logits of the file may be from the model's, beside a hundred-thousandth of their own size."""
_RELATIVE = 1e-5
_LARGEST_BATCH = 1024
_NOT_INSTALLED = "{} is not installed; `pip install 'siloweave[onnx]'`"


class _Named(torch.nn.Module):
    """A model whose inputs come in an order, and whose outputs are tensors alone."""

    def __init__(self, model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self._model, self._inputs, self._outputs = model, inputs, outputs

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self._model(**dict(zip(self._inputs, values, strict=True)))
        return tuple(getattr(found, name) for name in self._outputs)


def write_onnx(model: Any, task: Any, path: Path) -> dict[str, Any]:
    """Writes a model as ONNX, any number of texts of any length that fits its context at once, and compares both.

    Args:
        model: a plain one, in evaluation mode.
        task: whose head it has.
        path: of the file; weights of more than 2 GB lie beside it, in a file of that name with ``.data``.

    Returns:
        Names of inputs and outputs, and the largest difference between logits of the model and the file.

    Raises:
        InputError: torch's exporter can't take this model, or what it needs is not installed.
        SiloweaveError: the file answers otherwise than the model, or onnxruntime can't run it.
    """
    inputs, outputs = _names(model, task)
    named = _Named(model, inputs, outputs).eval()
    given = _batch(task, inputs, task.made_up(min(20, task.context_length), 2))
    try:
        program = _program(named, given, inputs, outputs, task.context_length)
        program.save(str(path), external_data=_bytes(model) > 2**31 - 2**20)
    except ModuleNotFoundError as error:
        raise InputError(_NOT_INSTALLED.format(error.name)) from None
    except torch.onnx.errors.OnnxExporterError:
        raise InputError(f"a {type(model).__name__} can't be written as ONNX by torch {torch.__version__}") from None
    return {"inputs": inputs, "outputs": outputs, "largest_difference": _compared(named, task, inputs, outputs, path)}


def _names(model: Any, task: Any) -> tuple[list[str], list[str]]:
    inputs = ["input_ids", "attention_mask"]
    if task.head.kind != "question answering":
        return inputs, ["logits"]
    return [*inputs, *["token_type_ids"] * tells_parts_apart(model)], ["start_logits", "end_logits"]


def _batch(task: Any, inputs: Sequence[str], examples: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    known = task.collate(examples)
    return tuple(known[name] for name in inputs)


def _program(
    model: torch.nn.Module,
    given: tuple[torch.Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    context_length: int,
) -> Any:
    sizes = {
        0: torch.export.Dim("batch", min=1, max=_LARGEST_BATCH),
        1: torch.export.Dim("tokens", min=2, max=context_length),
    }
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            model,
            given,
            dynamo=True,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=((sizes,) * len(inputs),),
            verbose=False,
        )
    # Where each node comes from in the code of this machine's user is nobody's business.
    for graph in (program.model.graph, *program.model.functions.values()):
        for node in graph.all_nodes():
            node.metadata_props.clear()
    return program


def _bytes(model: Any) -> int:
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def _compared(model: torch.nn.Module, task: Any, inputs: Sequence[str], outputs: Sequence[str], path: Path) -> float:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise InputError(_NOT_INSTALLED.format(error.name)) from None
    with _one_line():
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest = 0.0
    for shape, number in (
        (min(3, task.context_length), 1),
        (min(20, task.context_length), 3),
        (task.context_length, 2),
    ):
        batch = _batch(task, inputs, task.made_up(shape, number))
        given = {name: value.numpy() for name, value in zip(inputs, batch, strict=True)}
        with _one_line():
            found = session.run(list(outputs), given)
        with torch.no_grad():
            expected = model(*batch)
        for one, other in zip(expected, found, strict=True):
            beside = (one.float() - torch.from_numpy(other).float()).abs()
            if not bool((beside <= TOLERANCE + _RELATIVE * one.float().abs()).all()):
                raise SiloweaveError(f"onnxruntime's logits differ by {float(beside.max()):g}; the file is not kept")
            largest = max(largest, float(beside.max()))
    return largest


@contextmanager
def _one_line() -> Iterator[None]:
    """Onnxruntime's errors have no class in common, and take several lines."""
    try:
        yield
    except Exception as error:
        raise SiloweaveError(f"onnxruntime can't run the file ({lines_of(error)[0][:300]}); it is not kept") from error
