"""Node-local scratch: where a rank puts a checkpoint before it is copied, and where fetched ones lie.

It is below ``cluster.scratch_dir``, in a folder of this user that nobody else can write to: one per run and machine.
"""

import os
import platform
import stat
import tempfile
from pathlib import Path

from configs.errors import InputError
from configs.schema.schema import RunConfig
from configs.storage.files import digest_bytes, write_failure


def scratch_folder(config: RunConfig, run_directory: Path) -> Path:
    """The folder of a run on this machine; made where it is missing.

    Raises:
        InputError: others may write there: shards are pickles, which must come from nobody else.
        SiloweaveError: it can't be made.
    """
    mine = Path(config.cluster.scratch_dir or tempfile.gettempdir()) / f"siloweave-{os.getuid()}"
    place = config.run.url or str(run_directory)
    folder = mine / platform.node() / f"{config.run.name}-{digest_bytes(place.encode())[:16]}"
    try:
        mine.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = mine.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise InputError(
                f"{mine}: is not a folder that only this user can write to; remove it, or set cluster.scratch_dir"
            )
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(folder, error) from error
    return folder
