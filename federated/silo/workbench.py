"""What a silo computes with: its units, the warm model, the task. Knows no ledger, and decides nothing."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from logging import Logger
from pathlib import Path
from typing import Any

import torch

from configs.errors import InputError, PolicyRefusal
from configs.schema.silo import SiloConfig, SiloPolicy
from configs.schema.stages import SHORTEST_CONTEXT
from configs.schema.tasks import AugmentationSettings
from configs.storage.manifests import Manifest, require_manifest
from federated.adapters.arrays import Arrays
from federated.adapters.lora_factors import frozen, frozen_digest
from federated.adapters.warm_model import hold_back, put_beside, warm_model
from federated.protocol import silo_pb2 as pb
from federated.silo.local_training import LocalSettings
from federated.silo.requests import adaptation_of, arrays, correction_of
from federated.silo.units import Units
from privacy.clipping.clipping import clipping
from privacy.clipping.independence import Together
from privacy.declaration import declaration_of
from trainer.augmentation import Augment, augmentation
from trainer.data.reading.counts import Changed, reading, table
from trainer.device import CPU, beside, device_of, name_of
from trainer.models.adapters import Adaptation, AdaptationError, shapes, trainable
from trainer.tasks.task import Encoded, Task, task_of
from trainer.tasks.text import joined


class Examples:
    """The training units as a task has them.

    Args:
        task: what a record is.
        read: makes them, when they are asked for.
    """

    def __init__(self, task: Task, read: Callable[[Task], list[tuple[Encoded, ...]]]) -> None:
        self.task, self._read = task, read

    @cached_property
    def records(self) -> list[tuple[Encoded, ...]]:
        """The units, each as its examples. Private."""
        return self._read(self.task)


class Workbench:
    """What one silo computes with.

    Args:
        config: the silo. Its policy may change from request to request, and is given with each.
        base_model: the manifest of ``silo.base_model``.
        units: the silo's. Private.
        log: the silo's own.
    """

    def __init__(self, config: SiloConfig, base_model: Manifest, units: Units, log: Logger) -> None:
        self._config, self.base_model, self._units, self._log = config, base_model, units, log
        self._shorter: Examples | None = None  # of the newest length below the base model's
        self.device = device_of(config.silo.device, config.silo.gpu_memory_share)
        for note in units.notes:
            log.info("%s", note)

    @cached_property
    def task(self) -> Task:
        """What a record is to the model."""
        return task_of(self._config.task_spec, Path(self._config.silo.base_model))

    @cached_property
    def _whole(self) -> "Examples":
        return Examples(self.task, self._examples)

    def examples(self, train: pb.Train) -> "Examples":
        """What a round trains on: its task, and the training units, which are not read yet.

        Raises:
            PolicyRefusal: the request's length is no length of an example here.
        """
        length, longest = train.context_length or self.task.context_length, self.task.context_length
        if length == longest:
            return self._whole
        if not SHORTEST_CONTEXT <= length < longest:
            raise PolicyRefusal.of("context_length", str(length), f"{SHORTEST_CONTEXT} to {longest}")
        if self._shorter is None or self._shorter.task.context_length != length:
            spec, model = self._config.policy.task_spec, Path(self._config.silo.base_model)
            try:
                self._shorter = Examples(task_of(spec, model, length), self._examples)
            except InputError as error:  # it says nothing of records: they are not read yet
                raise PolicyRefusal.of("context_length", str(length), f"more, up to {longest}", str(error)) from None
        return self._shorter

    @property
    def records(self) -> list[tuple[Encoded, ...]]:
        """The training units as the base model's whole length has them. Private."""
        return self._whole.records

    def _examples(self, task: Task) -> list[tuple[Encoded, ...]]:
        """The training units, each as its examples. Private; what was changed is counted in the silo's own log."""
        records = [task.examples(unit) for unit in self._units.train]
        for line in self._table(records):
            self._log.info("%s", line)
        if self._units.deidentified is not None:
            self._log.info("spans de-identified, by kind: %s", self._units.deidentified)
        return records

    @property
    def notes(self) -> tuple[str, ...]:
        """What the steward should know of the text, files and ids of the data: exact, so for nobody else."""
        return (*self._table(self.records), *self._units.notes)

    def _table(self, records: list[tuple[Encoded, ...]]) -> list[str]:
        counts, cut = self._units.counts, sum(any(one.truncated for one in unit) for unit in records)
        empty = sum(not unit for unit in records)
        unknown = [self.task.unknown(one) for unit in records for one in unit]
        lines = [
            *reading(counts),
            Changed("dropped: no silo or unit", counts.without_unit, counts.rows),
            Changed("dropped: beyond data.max_rows_per_unit", self._units.beyond_cap, counts.rows),
            *(
                [Changed("dropped: torn by de-identification", self._units.torn, counts.rows)]
                if self._units.torn
                else []
            ),
            Changed(
                "replaced: tokens unknown to the model's tokenizer",
                sum(count for count, _ in unknown),
                sum(of for _, of in unknown),
            ),
            Changed("shortened: training units beyond the context", cut, len(records)),
        ]
        if empty:
            lines.append(
                Changed("dropped: training units with nothing to learn within the context", empty, len(records))
            )
        return table("text of this silo's records", lines)

    @cached_property
    def members_digest(self) -> str:
        """Of all units that may be trained on. Private."""
        return self._units.members_digest

    @property
    def held_out_texts(self) -> tuple[str, ...]:
        """The held-out units of a task whose records are texts. Private."""
        return tuple(joined(unit) for unit in self._units.held_out)

    @cached_property
    def held_out(self) -> list[tuple[Encoded, ...]]:
        """The held-out units, each as what is scored of it. Private."""
        return [self.task.scored(unit) for unit in self._units.held_out]

    def model(self, asked: pb.Train | pb.Evaluate) -> Any:
        """The warm base model, of which trains what a request describes.

        Raises:
            PolicyRefusal: the model hasn't got it, or another A is drawn here than the request's digest is of.
        """
        self._check_task(asked)
        spec = asked.adapter_spec
        seed = spec.frozen_seed if spec.frozen_digest else None
        how = replace(adaptation_of(spec), head=self.task.head)
        try:
            model = self._warm(how, seed)
        except AdaptationError as error:
            raise PolicyRefusal.of("adapter_spec", spec.train, "what this model has", str(error)) from None
        if spec.frozen_digest:  # another version of a library may draw another A, and then B would mean nothing
            factors = ((name, value) for name, value in model.named_parameters() if frozen(name))
            drawn = frozen_digest({name: value.detach().cpu().numpy() for name, value in factors})
            if drawn != spec.frozen_digest:
                raise PolicyRefusal.of("frozen_digest", spec.frozen_digest, drawn)
        return model

    def _warm(self, how: Adaptation, seed: int | None) -> Any:
        silo = self._config.silo
        ours = silo.clipping == "bookkeeping"
        return warm_model(Path(silo.base_model), how, silo.encryption_key_file, seed, onednn=ours, device=self.device)

    def device_note(self) -> str:
        """What was proved of the GPU, on made-up units; empty where the silo computes on a processor.

        Raises:
            InputError: it doesn't give the same bits again.
        """
        if self.device == CPU:
            return ""
        task, silo = self.task, self._config.silo
        model = self._warm(Adaptation(8, 16.0, self._config.policy.train[0], head=task.head), None).train()

        def losses(units: Sequence[Encoded]) -> torch.Tensor:
            return task.record_losses(model, task.collate(units))

        with beside(model), clipping(model, 1.0, silo.clipping) as clipper:
            together = Together(clipper, losses, task.shape, task.made_up, silo.micro_batch_size)
            sizes = [together.proved(task.shape(unit)) for unit in task.synthetic()]
        return (
            f"silo.device {silo.device}: computes on {name_of(self.device)}, which repeats its bits; made-up units of "
            f"a shape are computed {min(sizes)} at once, each with the bits that it has alone"
        )

    def _check_task(self, asked: pb.Train | pb.Evaluate) -> None:
        """Refuses another task than the records were read for: the policy may have changed since the silo started."""
        own, said = self._config.policy.task_spec, asked.task_spec
        words = (asked.task, tuple(said.labels), said.template, said.pooling or "model")
        if words != (own.name, own.labels, own.template, own.pooling):
            raise PolicyRefusal.of("task", asked.task, f"{own.name}, as the records were read when this silo started")

    def fitted(self, asked: pb.Train | pb.Evaluate, policy: SiloPolicy) -> tuple[Any, Arrays]:
        """The warm model and the request's adapter, which fits it; what doesn't train in this round is on the model.

        Raises:
            PolicyRefusal: it doesn't, or a value is beyond the policy's bound.
        """
        model, largest = self.model(asked), policy.max_adapter_value
        adapter, held, given = arrays(asked.adapter, largest), {}, {}
        if isinstance(asked, pb.Train):
            held = hold_back(model, asked.frozen_below)
            given = arrays(asked.frozen, largest, "frozen") if asked.frozen else {}
        if not adapter or shapes(trainable(model)) != shapes(adapter) or shapes(held) != shapes(given):
            raise PolicyRefusal.of(
                "adapter", "other names or shapes", "those of the adapter that adapter_spec describes"
            )
        put_beside(held, given)
        return model, adapter

    def local_settings(self, train: pb.Train, policy: SiloPolicy) -> LocalSettings:
        """What the request says of the steps, and the silo of their speed.

        Raises:
            PolicyRefusal: the request's correction is none, or this model reads no changed words as it wants.
        """
        silo = self._config.silo
        return LocalSettings(
            train.learning_rate,
            train.optimizer,
            silo.micro_batch_size,
            silo.clipping,
            train.proximal_mu,
            correction_of(train, policy.max_adapter_value),
            self._augment(train),
        )

    def _augment(self, train: pb.Train) -> Augment | None:
        shares = {name: getattr(train.augmentation, name) for name in AugmentationSettings.model_fields}
        try:
            return augmentation(self.task, AugmentationSettings(**shares))
        except InputError:
            asked = ", ".join(f"{name} {share:g}" for name, share in shares.items() if share)
            raise PolicyRefusal.of("augmentation", asked, "what this task and this model's tokenizer have") from None


def public_base_model(config: SiloConfig) -> Manifest:
    """The manifest of a silo's base model.

    Raises:
        InputError: there is none, or it does not say that only public text made the model; or somebody declares that
            of a model from elsewhere, and the policy does not list it.
    """
    folder = Path(config.silo.base_model)
    found = require_manifest(folder, "model", "export")
    declared = declaration_of(folder, found)
    if declared is not None:
        if found.content_digest not in config.policy.base_models:
            raise InputError(
                f"{folder}: made elsewhere ({declared.source}), and declared public by {declared.declared_public_by}; "
                f'to accept that word, put base_models = ["{found.content_digest}"] under [policy]'
            )
        return found
    if found.metadata.get("trained_on") != "public":
        raise InputError(
            f"{config.silo.base_model}: its manifest does not say that it was trained on public text only; "
            "give a base model that `siloweave export` made"
        )
    return found
