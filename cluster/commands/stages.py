"""The pipeline's commands. Heavy libraries are imported inside the command that needs them."""

import logging
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from configs.errors import InputError
from configs.imports import import_large
from configs.load import load
from configs.locks import working_on
from configs.parse import presets
from configs.printing import answer, say, stream, to_json
from configs.run_directory import run_directory
from configs.schema.schema import RunConfig
from configs.storage.layout import RunFiles
from configs.storage.mirror import open_mirror

ConfigOption = Annotated[
    str, typer.Option("--config", "-c", help=f"A TOML file, or a preset: {', '.join(presets())}.", show_default=True)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Overrides a setting: group.field=value, as in TOML, so lists, tables and quoted keys as well; a bare "
        "word is text. May be repeated.",
    ),
]
AddressOption = Annotated[
    str, typer.Option(help="Ray cluster to join. Default: RAY_ADDRESS, else a Ray of our own on this machine.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
FOLLOW_S = 2.0


def add_to(app: typer.Typer) -> None:
    """Registers the commands."""
    commands = (
        demo,
        prepare,
        pretrain,
        export,
        import_model,
        federate,
        report,
        audit,
        plan,
        doctor,
        status,
        decrypt,
    )
    for command in commands:
        app.command("import" if command is import_model else None)(command)


def demo(
    config: ConfigOption = "demo", override: SetOption = None, address: AddressOption = "", as_json: JsonOption = False
) -> None:
    """The whole pipeline on embedded data: prepare, pretrain, export, federate, evaluate, generate, report."""
    from cluster import pipeline
    from cluster.monitoring.console import Terminal, result_table

    settings = load(config, overrides(override, address))

    def work(run: Any) -> dict[str, Any]:
        return pipeline.demo(run, partial(stream, err=True))

    with working_on(run_directory(settings)):
        pipeline.set_aside_finished(settings, partial(say, err=True))
        _say_ledgers(settings)
        document, directory = with_run(settings, work, as_json)
    if as_json:
        say(to_json(document))
        return
    Terminal().print(result_table(document))
    files = RunFiles(directory)
    say(f"report: {files.page}", *([f"what its models say: {files.showcase_page}"] if document["showcase"] else []))


def prepare(config: ConfigOption = "demo", override: SetOption = None, as_json: JsonOption = False) -> None:
    """Cleans the public corpus, trains the tokenizer on it, packs it. Says what it changed or dropped."""
    from cluster import pipeline
    from trainer.data.reading.counts import of_corpora, table, warnings

    metadata, directory = with_run(load(config, overrides(override, "")), pipeline.prepare, as_json)
    changes = of_corpora(metadata)
    text = {change.what: {"count": change.count, "of": change.of} for change in changes}
    done = {"stage": "prepare", "directory": str(directory), "text": text, "warnings": warnings(changes)}
    answer(as_json, done, *table("text of the public corpora", changes), f"prepare: done in {directory}")


def pretrain(
    config: ConfigOption = "demo",
    override: SetOption = None,
    address: AddressOption = "",
    verify_resume: Annotated[
        bool, typer.Option("--verify-resume", help="Only show, in a few steps, that kills and resizing change no loss.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Pretrains on a gang of Ray actors with DeepSpeed; continues from the last commit."""
    if verify_resume:
        _verify_resume(config, override, address, as_json)
    else:
        _stage("pretrain", config, override, address, as_json)


def _verify_resume(config: str, override: list[str] | None, address: str, as_json: bool) -> None:
    from cluster import pipeline
    from cluster.checks import verify_resume as verification

    document, _ = with_run(load(config, overrides(override, address)), pipeline.verify_resume, as_json)
    answer(as_json, document, *verification.lines(document))
    if not document["holds"]:
        raise typer.Exit(1)


def export(config: ConfigOption = "demo", override: SetOption = None, as_json: JsonOption = False) -> None:
    """Writes the pretrained model as a Hugging Face directory."""
    _stage("export", config, override, "", as_json)


def import_model(config: ConfigOption = "demo", override: SetOption = None, as_json: JsonOption = False) -> None:
    """Takes a base model that others have made (`model.source`), and declares that public text alone has made it."""
    _stage("import_model", config, override, "", as_json)


def federate(
    config: ConfigOption = "demo", override: SetOption = None, address: AddressOption = "", as_json: JsonOption = False
) -> None:
    """Fine-tunes across the silos of a simulation under DP; continues from the last committed round."""
    _stage("federate", config, override, address, as_json)


def report(config: ConfigOption = "demo", override: SetOption = None, as_json: JsonOption = False) -> None:
    """Writes report.json and report.html of a finished run."""
    _stage("report", config, override, "", as_json)


def audit(
    config: ConfigOption = "demo",
    override: SetOption = None,
    canaries: Annotated[int, typer.Option(help="Gradient canaries of each audit.")] = 2000,
    as_json: JsonOption = False,
) -> None:
    """Audits the engine with canaries at a finished run's plan, and attacks public silos. Exit status 1 if it fails."""
    quiet_libraries()
    import_large("cluster.checks.audit")
    from cluster.checks import audit as audits
    from configs.errors import SiloweaveError

    document, directory = with_run(load(config, override or []), lambda run: audits.audit(run, canaries), as_json)
    answer(as_json, document, *audits.summary(document))
    if document["verdict"] == "warn":
        say("warning: a lower bound on epsilon exceeds the claim at 95% confidence; audit again", err=True)
    if document["verdict"] == "fail":
        place, failure = RunFiles(directory).audit_report, audits.failure(document)
        raise SiloweaveError(
            f"{place}: {failure}: the claim does not hold; release nothing, and look for what changed in the engine"
        )


def plan(
    config: ConfigOption = "demo",
    override: SetOption = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Also try how much memory a silo's private steps take; needs a base model.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """What a run will need and spend, before anything runs: bytes per rank, batches, steps, noise and epsilon."""
    quiet_libraries()
    import_large("cluster.checks.estimate", "transformers.modeling_utils")
    from cluster.checks.estimate import estimate

    found = estimate(load(config, override or []), memory=memory)
    answer(as_json, found, *_lines(found))


def doctor(config: ConfigOption = "demo", override: SetOption = None, as_json: JsonOption = False) -> None:
    """Looks at this machine before a run does. Exit status 1 where something must be fixed."""
    from dataclasses import asdict

    from cluster.checks.doctor import examine

    findings = examine(load(config, override or []))
    answer(as_json, [asdict(finding) for finding in findings], *map(str, findings))
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def status(
    run: Annotated[Path | None, typer.Argument(help="A run's directory. Default: that of the configuration.")] = None,
    config: ConfigOption = "demo",
    override: SetOption = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show it anew every two seconds, until Ctrl-C.")] = False,
    as_json: JsonOption = False,
) -> None:
    """How far a run is: stages, last step, rounds, epsilon and failures, from its files alone."""
    from cluster.monitoring import status as progress

    directory = run or _directory_to_look_at(load(config, override or []))

    def show() -> list[str]:
        found = progress.status(directory)
        return [to_json(found)] if as_json else progress.lines(found)

    if not follow:
        say(*show())
        return
    from cluster.monitoring.console import refresh

    refresh(show, FOLLOW_S)


def _directory_to_look_at(settings: RunConfig) -> Path:
    """A run's directory; that of an object store is brought here where it never was."""
    directory, mirror = run_directory(settings), open_mirror(settings)
    if mirror is not None and not directory.exists():
        mirror.pull()
    return directory


def decrypt(
    source: Annotated[Path, typer.Argument(help="An encrypted file, or a folder that holds some.")],
    target: Annotated[Path, typer.Argument(help="Where to write the copy in the clear; nothing may be there yet.")],
    key_file: Annotated[str, typer.Option(help="The key's file. Default: SILOWEAVE_ENCRYPTION_KEY.")] = "env:",
    as_json: JsonOption = False,
) -> None:
    """Writes a copy of encrypted files in the clear, for other programs to read."""
    from configs.storage.sealing import decrypt_tree, load_key

    key = load_key(key_file)
    if key is None:
        raise InputError("--key-file is empty: give the key's file, or `env:`")
    files = decrypt_tree(source, target, key)
    done = {"files": files, "target": str(target)}
    answer(as_json, done, f"decrypt: {files} files in the clear in {target}; keep it private")


def _say_ledgers(settings: RunConfig) -> None:
    """They lie outside the run, and another folder would be another budget."""
    from federated.simulation.simulated_places import ledgers_of

    say(f"ledgers of dataset {settings.data.private.dataset_id}: {ledgers_of(settings)}", err=True)


def _stage(name: str, config: str, override: list[str] | None, address: str, as_json: bool) -> None:
    from cluster import pipeline

    settings = load(config, overrides(override, address))
    if name == "federate":
        _say_ledgers(settings)
    _, directory = with_run(settings, getattr(pipeline, name), as_json)
    shown = name.partition("_")[0]  # `import` alone is a word of Python's
    answer(as_json, {"stage": shown, "directory": str(directory)}, f"{shown}: done in {directory}")


def overrides(override: list[str] | None, address: str) -> list[str]:
    """What ``--set`` and ``--address`` change."""
    return [*(override or []), *([f'cluster.address="{address}"'] if address else [])]


def with_run(settings: Any, work: Callable[[Any], Any], as_json: bool, *, quiet: bool = False) -> tuple[Any, Any]:
    """Locks and binds the run's directory, shows progress, and does the work."""
    from cluster.monitoring.console import Progressing
    from cluster.monitoring.listeners import listening
    from cluster.run import Run

    quiet_libraries()
    with (
        working_on(run_directory(settings)),
        Progressing(quiet=quiet or as_json) as shown,
        listening(settings) as listeners,
    ):
        run = Run(settings, (shown, *listeners))
        done = work(run)
        run.push()
        return done, run.directory


def quiet_libraries() -> None:
    """Other people's warnings and bars would drown our own lines; --debug lets them through."""
    if os.environ.get("SILOWEAVE_DEBUG"):
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if not _has_gpu() else "cuda")
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error", DATASETS_VERBOSITY="error")
    os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", TOKENIZERS_PARALLELISM="false")
    warnings.simplefilter("ignore")
    for name in ("DeepSpeed", "flwr", "absl", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _has_gpu() -> bool:
    return Path("/dev/nvidia0").exists()


def _lines(value: Any, name: str = "", indent: int = 0) -> list[str]:
    """A tree as indented lines for people."""
    if isinstance(value, dict):
        head = [f"{'  ' * indent}{name}"] if name else []
        return [*head, *(line for key, item in value.items() for line in _lines(item, key, indent + bool(name)))]
    if isinstance(value, float) and value >= 1e-3:
        value = f"{value:,.4f}".rstrip("0").rstrip(".")
    return [f"{'  ' * indent}{name}: {'none' if value is None else value}"]
