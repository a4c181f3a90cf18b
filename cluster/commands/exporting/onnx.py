"""``siloweave onnx``."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.chat import ElsewhereOption, ModelArgument
from cluster.commands.stages import JsonOption, quiet_libraries
from configs.load import load
from configs.printing import answer


def onnx(
    model: ModelArgument,
    output: Annotated[Path, typer.Option(help="Where to write; nothing may be there yet.")],
    config: ElsewhereOption = "",
    as_json: JsonOption = False,
) -> None:
    """Writes a finished model that gives labels, or finds answers, as an ONNX file with tokenizer and certificate.

    Its logits are compared with the model's in onnxruntime before anything is kept. It costs no privacy budget.
    """
    quiet_libraries()
    from cluster import exporting
    from cluster.finished import finished_model
    from cluster.optimising import refuse_existing

    refuse_existing(output)
    found = finished_model(model, load(config) if config else None)
    made = exporting.export_onnx(found, output)
    document = {
        **made.metadata,
        "directory": str(output),
        "digest": made.content_digest,
        "inputs": made.inputs,
        "reads": made.metadata["inputs"],
    }
    line = f"logits differ by {made.metadata['largest_difference']:.1g} at the most"
    answer(as_json, document, found.privacy, f"onnx: the model is in {output}; {line}")
