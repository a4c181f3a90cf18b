"""Makes ``slow://`` known to fsspec in every process, Ray's workers too: this folder is put on PYTHONPATH."""

import fsspec

fsspec.register_implementation("slow", "slow_store.SlowStore")
