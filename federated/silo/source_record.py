"""What a silo's records were read from when its ledger began, so that a steward is told of newer files."""

import json
from pathlib import Path

from configs.parse import json_object
from configs.schema.silo import SiloConfig
from configs.storage.files import write_atomic
from configs.storage.layout import SiloFiles
from federated.silo.units import rows_of
from trainer.data.origins import differences, origin


def source_note(config: SiloConfig) -> str:
    """A line for the steward where the source's files are others than at the last start; empty where they are not.

    The ledger is kept whatever the files are: it is about the people in them.

    Raises:
        InputError: what was recorded can't be read, or a file changes meanwhile.
    """
    files, path = rows_of(config.data, config.policy.task_spec).files, SiloFiles(Path(config.silo.state_dir)).source
    if files is None:  # no files of its own
        return ""
    before = json_object(path.read_bytes(), str(path))["files"] if path.exists() else None
    found = differences(before, files) if before is not None else ""
    if found or before is None:
        write_atomic(path, json.dumps(origin(config.data.source, files), indent=2, sort_keys=True).encode())
    if not found:
        return ""
    return (
        f"data.source {config.data.source!r}: other files than at the last start: {found}; the ledger goes on, since "
        "what was spent was spent on the same people; if others are in them now, give those a dataset_id of their own"
    )
