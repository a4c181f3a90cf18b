"""A store for fsspec, on a folder: the files of one step and rank arrive slowly, or come to a stand."""

import os
import time
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

PIECES, PIECE_S = 80, 0.25


class SlowStore(LocalFileSystem):
    """SILOWEAVE_TEST_SLOW holds ``slow`` or ``stop``, a step's folder and a rank, with spaces between."""

    protocol = "slow"

    def __init__(self, **options):
        super().__init__(auto_mkdir=True, **options)

    @classmethod
    def _strip_protocol(cls, path):
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return LocalFileSystem._strip_protocol(os.fspath(path).removeprefix("slow://"))

    def put_file(self, lpath, rpath, callback, **options):
        how, step, rank = Path(os.environ["SILOWEAVE_TEST_SLOW"]).read_text().split()
        if "optim_states" in rpath and step in rpath and rank == os.environ["RANK"]:
            for _ in range(PIECES):  # the pieces are waited for, as those of a slow line are, and written at once
                time.sleep(PIECE_S)
                callback.relative_update(os.path.getsize(lpath) // PIECES)  # noqa: PTH202
                while how == "stop":
                    time.sleep(1)
        super().put_file(lpath, rpath, **options)
