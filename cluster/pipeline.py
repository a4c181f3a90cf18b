"""The main job, stage after stage, as one story. Each stage can be run alone, again, and after a kill.

prepare -> pretrain -> export -> federate -> evaluate -> generate -> show -> report

A base model that others have made takes the place of the first three: import -> federate -> ...
"""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from cluster.run import Run
from cluster.runtime.session import ray_session
from cluster.showing import show
from configs.errors import InputError
from configs.events import EventLog
from configs.imports import import_large
from configs.parse import json_object, reading
from configs.run_directory import run_directory
from configs.schema.schema import RunConfig
from configs.schema.tasks import WRITES
from configs.storage.files import write_atomic
from configs.storage.layout import FEDERATED, NO_DP, RunFiles
from configs.storage.manifests import MANIFEST, read_manifest, require_manifest
from configs.storage.mirror import open_mirror
from trainer.inference.decoding import Decoding

Printer = Callable[[str], None]


def demo(run: Run, on_text: Printer) -> dict[str, Any]:
    """The whole job. Returns the report."""
    from_elsewhere = bool(run.config.model.source)
    _task_fits(run.config)
    _private_data_fit(run.config)
    (import_model if from_elsewhere else prepare)(run)
    with run.ray():
        if not from_elsewhere:
            pretrain(run)
            export(run)
        federate(run)
        evaluate(run)
    generate(run, on_text)
    show(run, sample_decoding(run.config))
    return report(run)


def prepare(run: Run) -> dict[str, Any]:
    """Public text to tokens, and the tokenizer; a large corpus on Ray. Returns what the corpus' manifest counts."""
    from cluster.runtime.preparation import ray_map
    from trainer.data.deidentify import open_deidentifier
    from trainer.data.origins import ORIGINS
    from trainer.data.parts import one_after_the_other
    from trainer.data.prepare import prepare as prepare_corpus

    _trains_its_own(run.config)
    _is_a_model(run.config)
    workers = run.config.data.workers
    with run.stage("prepare"), ray_session(run.config.cluster, workers) if workers > 1 else nullcontext():
        manifest = prepare_corpus(
            run.config,
            run.directory,
            open_deidentifier(run.config.data.deidentify),
            ray_map if workers > 1 else one_after_the_other,
            lambda done, of: run.log.emit("prepare", "part", part=done, parts=of),
            partial(_say_of_sources, run, "prepare"),
            partial(_replace_corpus, run),
        )
    # A source may have a hundred thousand files.
    facts = {name: fact for name, fact in manifest.metadata.items() if name != ORIGINS}
    run.log.emit("prepare", "corpus", **facts)
    return facts


def _say_of_sources(run: Run, stage: str, line: str) -> None:
    run.log.emit(stage, "source", message=line)


def _replace_corpus(run: Run, changes: Sequence[str]) -> None:
    """Refuses another corpus once something was trained on the one that is there."""
    from trainer.checkpoints.checkpoints import steps, storage

    trained = steps(storage(run.config, run.directory))
    if trained:
        raise InputError(
            f"{'; '.join(changes)}; {trained[-1]} steps are trained on the files as they were: bring those back, give "
            "another run.name, or go on with the prepared corpus by `siloweave pretrain`"
        )
    for change in changes:
        _say_of_sources(run, "prepare", f"{change}; the corpus is prepared again")


def _look_at_sources(run: Run, stage: str, *, begun: bool) -> None:
    """Says what has become of the files that the corpus was prepared from. What has not begun does not begin then."""
    from trainer.data.origins import since_prepared

    with reading(run.files.corpus, "run `siloweave prepare` again"):
        corpus = read_manifest(run.files.corpus, "corpus")
        if corpus is None:
            return
        found = since_prepared(run.config, corpus)
    if found.changed and not begun:
        raise InputError(f"{'; '.join(found.changed)}; run `siloweave prepare` again")
    for line in (*found.changed, *found.unknown):
        _say_of_sources(run, stage, f"{line}; the corpus as prepared is used")


def pretrain(run: Run) -> None:
    """Tokens to a trained checkpoint, on a gang of Ray actors; continues from the newest commit."""
    from cluster.runtime.gang import run_gang
    from trainer.checkpoints.checkpoints import check_same_corpus, newest, pretrain_digest, storage

    _trains_its_own(run.config)
    corpus = require_manifest(run.files.corpus, "corpus", "prepare")
    _is_a_model(run.config)
    digest, commits = pretrain_digest(run.config, corpus.content_digest), storage(run.config, run.directory)
    check_same_corpus(commits, digest)
    commit = newest(commits, digest, lambda _: None)
    if commit is not None and commit.step == run.config.pretrain.steps:
        return
    _look_at_sources(run, "pretrain", begun=commit is not None)
    with run.stage("pretrain"), run.ray():
        run_gang(run.config, run.directory, partial(_forward, run.log, "pretrain"))


def verify_resume(run: Run) -> dict[str, Any]:
    """Shows in a run of its own that kills and other numbers of ranks change no loss."""
    from cluster.checks.verify_resume import sizes_of
    from cluster.checks.verify_resume import verify_resume as verify

    with run.ray():
        tell = partial(_forward, run.log, "verify-resume")
        return verify(run.config, run.directory, tell, sizes_of(run.config))


def _forward(log: EventLog, stage: str, event: dict[str, Any]) -> None:
    """Passes another log's, or a rank's, event on as one of this stage."""
    values = {name: value for name, value in event.items() if name not in ("time", "stage", "event")}
    log.emit(stage, event["event"], **values)


def export(run: Run) -> None:
    """Checkpoint to a portable Hugging Face directory."""
    from trainer.export import export as export_model

    _trains_its_own(run.config)
    _look_at_sources(run, "export", begun=True)
    with run.stage("export"):
        export_model(run.config, run.directory)


def import_model(run: Run) -> None:
    """A base model that others have made, declared to be of public text by whoever runs this."""
    from federated.identity.trust import coordinator_signer
    from privacy.declaration import DECLARATION, declare
    from trainer.data.languages import losses
    from trainer.data.tokenizer import load_tokenizer
    from trainer.imported import import_model as take

    if not run.config.model.source:
        raise InputError("model.source is empty: name the model to import; without one the base model is pretrained")
    signer = coordinator_signer(Path(run.config.federated.state_dir))
    with run.stage("import"):
        manifest = take(run.config, run.directory, lambda facts: declare(facts, signer).encode(), DECLARATION)
    run.log.emit("import", "model", digest=manifest.content_digest, declared_public_by=signer.public_key)
    for line in losses(load_tokenizer(run.model)):
        run.log.emit("import", "tokenizer", message=line)


def _trains_its_own(config: RunConfig) -> None:
    if config.model.source:
        raise InputError(
            f"model.source is {config.model.source!r}: the base model is not trained here; run `siloweave import`"
        )


def _is_a_model(config: RunConfig) -> None:
    """Refuses a configuration file that gives none, or has not got the layers that stages freeze.

    What families need is known to the settings.
    """
    if config.model.config:
        from trainer.models.families import empty_model
        from trainer.pretraining.optimizers import hold_back

        hold_back(empty_model(config.model, config.tokenizer.vocab_size, config.objective), config)


def _private_data_fit(config: RunConfig) -> None:
    """Reads a simulation's records before anything is trained: what can't be read, or has no label, is said now."""
    from federated.simulation.simulation import look_at_private

    if not config.data.private.source.startswith("hf:"):
        look_at_private(config)


def _task_fits(config: RunConfig) -> None:
    task, writes = config.federated.task, ["causal"]
    if task in ("translation", "summarisation"):
        writes.append("span_corruption")
    if config.federated.task_spec.in_words and config.objective not in writes and not config.model.source:
        asked = f"task is {task!r}" if task in WRITES else f"pooling is {config.federated.pooling!r}"
        raise InputError(
            f"federated.{asked}: a base model that is pretrained by {config.objective!r} predicts no next "
            "token of it; it can be pretrained and exported here, and a federation needs another model.family"
        )


def federate(run: Run) -> None:
    """Fine-tunes across the silos under DP; then the same without DP where the settings ask for it."""
    _task_fits(run.config)
    model = require_manifest(run.model, "model", run.config.model.made_by).content_digest
    import_large("federated.simulation.simulation")  # which takes seconds
    from federated.coordinator.final_model import publish
    from federated.simulation.simulation import simulate

    for stage, with_dp in _federations(run.config):
        directory = run.directory / stage
        if (directory / MANIFEST).exists():
            if require_manifest(directory, stage, "federate").inputs["model"] != model:
                raise InputError(f"{directory}: was made from another base model; delete it, and run the command again")
            continue
        with run.stage(stage), run.ray() as ray:
            on_event = partial(_federation_event, run, stage)
            simulate(ray, run.config, run.model, directory, with_dp=with_dp, on_event=on_event)
            publish(run.config, run.model, directory, stage)


def _federation_event(run: Run, stage: str, event: dict[str, Any]) -> None:
    """Rounds are pushed as they come. A kill may lose the last one: asked again, silos answer as they did."""
    _forward(run.log, stage, event)
    if event["event"] == "round":
        run.push()


def _federations(config: RunConfig) -> list[tuple[str, bool]]:
    return [(FEDERATED, True), *([(NO_DP, False)] if config.evaluate.without_dp else [])]


def evaluate(run: Run) -> dict[str, Any]:
    """A task's figures before, by round, and after: of a simulation's public silos, and of one's own public text."""
    from federated.coordinator.outcome import over_flower

    federation = run.files.federated
    with run.stage("evaluate"):
        stages = [stage for stage, with_dp in _federations(run.config) if with_dp or not over_flower(federation)]
        federations = {stage: run.directory / stage for stage in stages}
        for stage, directory in federations.items():  # said before anything takes time: imports, and Ray's start
            require_manifest(directory, stage, "federate")
        from cluster.report.report import missing
        from federated.simulation.in_the_clear import evaluate_rounds

        with run.ray() as ray:
            scores = evaluate_rounds(
                ray, run.config, run.model, federations, lambda **v: run.log.emit("evaluate", "scored", **v)
            )
        for line in missing(scores):
            run.log.emit("evaluate", "missing", message=line)
    write_atomic(run.files.evaluation, json.dumps(scores, indent=2).encode())
    return scores


def evaluate_base(run: Run, shots: int) -> tuple[dict[str, Any], list[str]]:
    """The base model before any fine-tuning, on a simulation's public silos; and what was fine-tuned, as evaluated.

    Returns:
        The figures, and the same as lines for people.
    """
    from federated.simulation.few_shot import lines, score_base

    require_manifest(run.model, "model", run.config.model.made_by)
    found = score_base(run.config, run.model, shots)
    if not run.files.evaluation.exists():
        return found, lines(found)
    with reading(run.files.evaluation, "run `siloweave evaluate` again"):
        rounds = json_object(run.files.evaluation.read_bytes(), str(run.files.evaluation))
        found |= {stage: rounds[stage][-1] for stage in (FEDERATED, NO_DP) if rounds.get(stage)}
        return found, lines(found)


def generate(run: Run, on_text: Printer, prompts: Sequence[str] = (), decoding: Decoding | None = None) -> list[str]:
    """Texts of the final model, streamed; none where the task teaches it no writing, and a line says so."""
    from trainer.tasks.task import WritingTask, task_of

    require_manifest(run.files.federated, FEDERATED, "federate")
    task, texts = task_of(run.config.federated.task_spec, run.model), list[str]()
    with run.stage("generate"):
        if isinstance(task, WritingTask):
            texts = _samples(run, task, on_text, prompts or [run.config.evaluate.prompt], decoding)
        else:
            on_text(f"federated.task is {run.config.federated.task!r}: this model writes no text\n")
    write_atomic(run.files.sample, "\n\n".join(texts).encode())
    return texts


def _samples(run: Run, task: Any, on_text: Printer, prompts: Sequence[str], decoding: Decoding | None) -> list[str]:
    from federated.coordinator.final_model import final_model
    from trainer.data.tokenizer import load_tokenizer
    from trainer.inference.generation import generate as sample

    model, tokenizer = final_model(run.config, run.model, run.files.federated), load_tokenizer(run.model)
    texts = list[str]()
    for prompt in prompts:
        texts.append(sample(model, task, tokenizer, prompt, decoding or sample_decoding(run.config), on_text))
        on_text("\n")
    return texts


def sample_decoding(config: RunConfig) -> Decoding:
    """How a run's sample is drawn."""
    asked = config.evaluate
    return Decoding(asked.sample_tokens, asked.temperature, top_k=50, top_p=0.95, seed=config.run.seed)


def report(run: Run) -> dict[str, Any]:
    """``report.json`` for machines and ``report.html`` for people."""
    from cluster.report.page import render
    from cluster.report.report import LOOK, build

    _look_at_sources(run, "report", begun=True)
    document = build(run.config, run.directory)
    with reading(run.directory, LOOK):
        page = render(document).encode()
    write_atomic(run.files.page, page)
    write_atomic(run.files.report, json.dumps(document, indent=2).encode() + b"\n")
    return document


def set_aside_finished(config: RunConfig, say: Printer) -> None:
    """Moves a finished run of this name away, so that the demo starts anew; an unfinished one is continued.

    The silos' ledgers stay where they are: a new run is a new reservation.
    """
    directory, mirror = run_directory(config), open_mirror(config)
    report = RunFiles(directory).report
    name = f"{directory.name}-until-{datetime.now(tz=UTC).strftime('%Y%m%d-%H%M%S')}"
    if mirror is not None:
        if mirror.bucket.read(report.name) is None:
            return
        mirror.move(name)
    elif report.exists():
        directory.rename(directory.with_name(name))
    else:
        return
    target = directory.with_name(name) if mirror is None else f"{config.run.storage.rstrip('/')}/{name}"
    say(f"{directory.name} had finished before: kept as {target}, starting anew")
