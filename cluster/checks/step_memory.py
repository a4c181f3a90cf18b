"""What a private step takes of memory, tried instead of computed.

A process of a simulation takes steps on made-up records of the context's length. A formula was wrong by up to half: how
many records are computed together, and what libraries hold and keep between steps, show when they are taken.
"""

import math
import time
from pathlib import Path
from typing import Any

import psutil

from cluster.runtime.session import ray_session
from configs.errors import InputError
from configs.run_directory import run_directory
from configs.schema.schema import RunConfig
from configs.storage.layout import RunFiles
from configs.storage.manifests import require_manifest
from privacy.plan import PlanTerms

_STEPS = 2  # the second has the optimizer's moments beside it
_MOST_RECORDS = 32  # of a step: all that are computed together, twice


def step_memory(config: RunConfig, plan: PlanTerms) -> dict[str, Any]:
    """The most memory that a simulated silo's process holds, by a trial in such a process.

    Args:
        config: the run's settings.
        plan: the run's.

    Returns:
        ``peak_bytes``, resident, the process's libraries included; ``records_per_step`` and ``tokens`` of the trial;
        the ``seconds`` that it took.

    Raises:
        InputError: the run has no base model yet, or protects clients; the model does not fit this machine's memory; or
            its private gradients can't be proved.
    """
    if plan.unit != "record":
        raise InputError("privacy.unit is 'client': silos take no private steps then; leave --memory out")
    base_model = RunFiles(run_directory(config)).model
    manifest = require_manifest(base_model, "model", config.model.made_by)
    parameters, free = manifest.metadata.get("parameters"), psutil.virtual_memory().available
    weights = 4 * parameters if isinstance(parameters, int) else 0
    if weights > free:
        raise _too_large(base_model, f"its weights are {weights:,} bytes, and {free:,} are free here")
    records = max(1, round(min(_MOST_RECORDS, plan.sampling_rate * _record_count(config))))
    began = time.monotonic()
    with ray_session(config.cluster, 1) as ray:
        trial = ray.remote(_peak_bytes).options(num_cpus=config.cluster.threads_per_rank, max_retries=0)
        try:
            peak = ray.get(trial.remote(config, plan, base_model, records))
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
            raise _too_large(base_model, "the trial's process was ended, for want of memory likely") from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise error.cause from None
            raise
    return {
        "peak_bytes": peak,
        "records_per_step": records,
        "tokens": config.model.context_length,
        "seconds": round(time.monotonic() - began, 1),
    }


def _too_large(base_model: Path, why: str) -> InputError:
    return InputError(f"{base_model}: {why}; try on a machine with more memory, or leave --memory out")


def _record_count(config: RunConfig) -> int:
    private = config.data.private
    return max(private.public_record_count, *private.public_record_counts.values(), 0)


def _peak_bytes(config: RunConfig, terms: PlanTerms, base_model: Path, records: int) -> int:
    """In a process of its own: a round as ``federated.silo.silo`` takes it, on as many records a step on average."""
    import torch

    from federated.adapters.arrays import from_bytes, to_bytes
    from federated.adapters.warm_model import adaptation, warm_model
    from federated.protocol import silo_pb2 as pb
    from federated.silo.local_training import LocalSettings, PrivateUpdate
    from federated.simulation import simulation  # noqa: F401  (loads what a silo's process has beside what is used here)
    from privacy.mechanism.streams import SEED_BYTES, Streams
    from trainer.models.adapters import adapter_weights
    from trainer.tasks.task import longest_shape, task_of

    how = config.federated
    torch.set_num_threads(config.cluster.threads_per_rank)
    task = task_of(how.task_spec, base_model)
    model = warm_model(
        base_model,
        adaptation(how, task.head),
        config.run.encryption_key_file,
        0 if how.adapters == "ffa" else None,
        onednn=how.clipping == "bookkeeping",
    )
    # A request is there all the time, as bytes and as arrays.
    content = to_bytes({name: value.numpy() for name, value in adapter_weights(model).items()})
    correction = content if how.aggregation == "scaffold" else b""
    asked = pb.Request.FromString(
        pb.Request(train=pb.Train(adapter=content, correction=correction)).SerializeToString()
    ).train
    settings = LocalSettings(
        how.learning_rate,
        how.optimizer,
        how.micro_batch_size,
        how.clipping,
        how.proximal_mu,
        from_bytes(asked.correction) if asked.correction else {},
    )
    few = terms.model_copy(update={"rounds": 1, "steps_per_round": _STEPS, "metric_releases": ()})
    update = PrivateUpdate(few.bind(_record_count(config)), model, task, from_bytes(asked.adapter), settings)
    units = [(one,) for one in task.made_up(longest_shape(task), math.ceil(records / terms.sampling_rate))]
    update.run(Streams(bytes(SEED_BYTES), "00" * 32), units)
    return _most_resident()


def _most_resident() -> int:
    """Linux's high-water mark of this process alone; that of getrusage begins with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
