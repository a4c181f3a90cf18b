"""Where simulated silos are: their settings, and their ledgers."""

from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

from configs.errors import InputError
from configs.identities import UnclearIdentityError, canonical
from configs.schema.places import here, ledgers
from configs.schema.schema import RunConfig
from configs.schema.silo import (
    MOST_SIMULATED_ROUNDS,
    MOST_SIMULATED_RUNS,
    SiloConfig,
    SiloDataSettings,
    SiloPolicy,
    SiloSettings,
)
from configs.storage.layout import AGGREGATOR_FOLDER, SiloFiles, name_on_disk
from configs.storage.manifests import read_manifest
from federated.protocol.bounds import WHOLE
from privacy.declaration import DECLARATION


def ledgers_of(config: RunConfig) -> Path:
    """Folder of the ledgers that a run's releases are charged to."""
    return simulated_ledger(config) if config.privacy.unit == "client" else _dataset_folder(config)


def simulated_ledger(config: RunConfig) -> Path:
    """Folder of a simulated aggregator's ledger, one per dataset; the + keeps it apart from any dataset's own."""
    return Path(config.federated.state_dir) / f"+{AGGREGATOR_FOLDER}" / config.data.private.dataset_id


def ledgers_of_other_spellings(config: RunConfig, names: Iterable[str]) -> dict[str, Path]:
    """Folders with a ledger of a silo that was another one while it was written in another way, by its name now."""
    known, found = {name.casefold(): name for name in names}, {}
    for ledger in sorted(_dataset_folder(config).glob(f"*/{SiloFiles(Path()).ledger.name}")):
        name = unquote(ledger.parent.name)
        try:
            form = canonical(name)
        except UnclearIdentityError:
            continue
        if form and (now := known.get(form.casefold())) not in (None, name):
            found[now] = ledger.parent
    return found


def refuse_earlier_place(config: RunConfig) -> None:
    """Refuses private data whose ledgers are where an unset ``federated.state_dir`` was in earlier versions.

    Raises:
        InputError: they are, and know what was spent, and those of the new place would not.
    """
    earlier, folder = here() / "state", _dataset_folder(config)
    pattern = f"*/{SiloFiles(Path()).ledger.name}"
    if config.data.private.public or folder.parent != ledgers() or any(folder.glob(pattern)):
        return
    if any((earlier / folder.name).glob(pattern)):
        raise InputError(
            f"{earlier / folder.name}: ledgers of this dataset from an earlier version, whose budget would begin anew "
            f'in {ledgers()}; set federated.state_dir = "{earlier}", or move {earlier} there as a whole'
        )


def _dataset_folder(config: RunConfig) -> Path:
    return Path(config.federated.state_dir) / config.data.private.dataset_id


def _imported(base_model: Path) -> tuple[str, ...]:
    """The digest of a base model from elsewhere: whoever simulates the stewards has declared it."""
    manifest = read_manifest(base_model, "model")
    return (manifest.content_digest,) if manifest is not None and DECLARATION in manifest.files else ()


def simulated_silo(config: RunConfig, name: str, base_model: Path) -> SiloConfig:
    """A silo of a simulation: its share of the run's private data, and the simulated steward's policy."""
    private, privacy = config.data.private, config.privacy
    state_dir = _dataset_folder(config) / name_on_disk(name, safe=" '")
    return SiloConfig(
        silo=SiloSettings(
            id=name,
            dataset_id=private.dataset_id,
            state_dir=str(state_dir),
            base_model=str(base_model),
            encryption_key_file=config.run.encryption_key_file,
            public_record_count=private.record_count(name),
            micro_batch_size=config.federated.micro_batch_size,
            clipping=config.federated.clipping,
        ),
        data=SiloDataSettings(
            source=private.source,
            text=private.text,
            columns=private.columns,
            labels=private.labels,
            language=private.language,
            split=private.split,
            encoding=private.encoding,
            silo=private.silo,
            unit=private.unit,
            max_rows_per_unit=private.max_rows_per_unit,
            held_out_fraction=private.held_out_fraction,
            public=private.public,
            deidentify=config.data.deidentify,
        ),
        policy=SiloPolicy(
            budget_epsilon=privacy.budget_epsilon,
            budget_delta=privacy.budget_delta,
            max_epsilon_per_run=privacy.budget_epsilon,
            base_models=_imported(base_model),
            units=(privacy.unit,),
            honest_silos=privacy.min_honest,
            tasks=(config.federated.task,),
            labels=config.federated.labels,
            template=config.federated.template,
            pooling=config.federated.pooling,
            train=(config.federated.train,),
            max_augmentation=config.federated.augmentation.largest,
            releases_metrics=True,
            max_runs_per_day=MOST_SIMULATED_RUNS,
            max_open_runs=MOST_SIMULATED_RUNS,
            max_rounds_per_run=MOST_SIMULATED_ROUNDS,
            max_request_bytes=WHOLE,  # what messages weigh is bounded on a line, and there is none
            max_new_tokens=privacy.evaluation_max_new_tokens,
            label_sets=(privacy.evaluation_labels,) if privacy.evaluation_labels else (),
            # Without a unit column a row is a unit, and a row is in one silo.
            attests_disjoint_units=not private.unit,
        ),
    )
