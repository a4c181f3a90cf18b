"""Makes a dossier, and verifies one offline: it is written again by its documents, and has to be the same bytes."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.report.dossier.registry import entry
from cluster.report.dossier.sections import FORM, sections
from cluster.report.dossier.sources import AUDIT, COORDINATOR, CoordinatorWord, Sources, Traffic
from configs.errors import InputError
from configs.events import read_events
from configs.parse import json_object, parse, reading
from configs.printing import printable
from configs.schema.schema import RunConfig
from configs.storage.files import digest_bytes, write_atomic
from configs.storage.layout import CERTIFICATE, EVENTS, FEDERATED, RunFiles
from configs.storage.manifests import require_manifest
from configs.storage.sealing import load_key
from privacy.certificate.check import check_certificate
from privacy.certificate.model_digests import ModelDigests, which_model

PAGE, DOCUMENT, REGISTRY, SUMS = "dossier.html", "dossier.json", "registry.yaml", "SHA256SUMS"
_GIVEN, _WRITTEN = (CERTIFICATE, COORDINATOR), (DOCUMENT, PAGE, REGISTRY, SUMS)
_LARGEST_BYTES = 2**28
_AGAIN = "make the dossier again"


def make(config: RunConfig, run_directory: Path, output: Path | None) -> tuple[Path, str]:
    """Writes the dossier of a finished run, in a folder that is there whole or not at all.

    Args:
        config: the run's settings.
        run_directory: where it lies.
        output: the folder; None is ``dossier/`` in the run.

    Returns:
        The folder, and the digest by which people can compare two copies of it.

    Raises:
        InputError: the run has not finished, its certificate doesn't hold, or what it has published is another model;
            or something is there already.
    """
    from federated.coordinator.final_model import published  # needs torch, and verifying does not

    files, target = RunFiles(run_directory), output or RunFiles(run_directory).dossier
    require_manifest(files.federated, FEDERATED, "federate")
    given = {CERTIFICATE: _read(files.certificate, "run `siloweave federate` first")}
    certificate = _checked(given[CERTIFICATE], str(files.certificate))
    model, folder = ModelDigests.model_validate(certificate["model"]), files.federated / published(config)
    which_model(model, folder, load_key(config.run.encryption_key_file))
    given[COORDINATOR] = _encoded(_word(config, files, model).model_dump(mode="json"))
    audit = files.audit / "run" / CERTIFICATE
    if (
        audit.is_file()
        and _checked(content := _read(audit, "audit again"), str(audit), model=False)["plan_digest"]
        == (certificate["plan_digest"])
    ):
        given[AUDIT] = content
    contents = _written(given, str(target))
    if target.exists():
        raise InputError(f"{target}: is there already; move it away, or give another --output")
    _put(contents, target)
    return target, digest_bytes(contents[DOCUMENT])


def verify(folder: Path) -> dict[str, Any]:
    """Checks a dossier with what lies in its folder alone.

    Returns:
        What it is about: ``run``, ``headline``, ``digest``, ``files``, ``sentences``.

    Raises:
        InputError: a file is missing, was added or has another byte than it was written with, or its certificate
            doesn't hold.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give one that `siloweave dossier` wrote")
    names = {path.name for path in folder.iterdir()}
    for name in (*_GIVEN, *_WRITTEN):
        if name not in names:
            raise InputError(f"{folder / name}: missing; {_AGAIN}")
    for name in sorted(names - {*_GIVEN, *_WRITTEN, AUDIT}):
        raise InputError(f"{folder / name}: no file of a dossier; take it away")
    there = {name: _read(folder / name, _AGAIN) for name in sorted(names)}
    _check_form(there[DOCUMENT], folder / DOCUMENT)
    _check_sums(there, folder)
    contents = _written({name: there[name] for name in (*_GIVEN, AUDIT) if name in there}, str(folder))
    for name, content in contents.items():
        if there[name] != content:
            raise InputError(f"{folder / name}: not what its certificate gives; do not trust it")
    document = json.loads(contents[DOCUMENT])
    return {
        "run": document["run"],
        "headline": document["headline"],
        "digest": digest_bytes(contents[DOCUMENT]),
        "files": len(contents),
        "sentences": sum(len(section["sentences"]) for section in document["sections"]),
    }


def _word(config: RunConfig, files: RunFiles, model: ModelDigests) -> CoordinatorWord:
    """What the run's own settings and log say. Of a round that was done twice the last time counts."""
    log = files.federated / EVENTS
    with reading(log, "put its backup back"):
        rounds = {event["round"]: event for event in read_events(log) if event["event"] == "round"}
        traffic = [
            Traffic(
                round=number,
                ended=datetime.fromtimestamp(event["time"], tz=UTC),
                answered=tuple(event["answered"]),
                moved_bytes=event["bytes"],
            )
            for number, event in sorted(rounds.items())
        ]
    spec = config.federated.task_spec
    return CoordinatorWord(
        run=config.run.name,
        task=spec.name,
        labels=spec.labels,
        train=config.federated.train,
        published=model.adapter,
        rounds=tuple(traffic),
    )


def _checked(content: bytes, origin: str, *, model: bool = True) -> dict[str, Any]:
    document = json_object(content, origin)
    check_certificate(document, origin)
    if model and not document.get("model"):
        raise InputError(f"{origin}: version {document['version']} names no model; a dossier is about one")
    return document


def _sources(given: Mapping[str, bytes], origin: str) -> Sources:
    certificate = _checked(given[CERTIFICATE], f"{origin}/{CERTIFICATE}")
    where = f"{origin}/{COORDINATOR}"
    word = parse(CoordinatorWord, json_object(given[COORDINATOR], where), where)
    if word.published != certificate["model"]["adapter"]:
        raise InputError(f"{where}: published: not the files of the certificate; do not trust it")
    audit = _checked(given[AUDIT], f"{origin}/{AUDIT}", model=False) if AUDIT in given else None
    if audit is not None and audit["plan_digest"] != certificate["plan_digest"]:
        raise InputError(f"{origin}/{AUDIT}: plan_digest: is of another plan; do not trust it")
    return Sources(certificate, word, audit, {name: digest_bytes(given[name]) for name in sorted(given)})


def _written(given: Mapping[str, bytes], origin: str) -> dict[str, bytes]:
    """Every file of a dossier, by its name."""
    sources = _sources(given, origin)
    found, registry = sections(sources), _encoded(entry(sources))
    document = {
        "form": FORM,
        "run": sources.word.run,
        "headline": sources.certificate["headline"],
        "files": dict(sources.digests),
        "sections": [{"title": title, "sentences": [asdict(one) for one in said]} for title, said in found],
    }
    contents = {
        CERTIFICATE: given[CERTIFICATE],
        COORDINATOR: _encoded(sources.word.model_dump(mode="json")),
        **({AUDIT: given[AUDIT]} if AUDIT in given else {}),
        DOCUMENT: _encoded(document),
        PAGE: _page(document, registry).encode(),
        REGISTRY: registry,  # JSON is YAML
    }
    sums = "".join(f"{digest_bytes(content)}  {name}\n" for name, content in sorted(contents.items()))
    return {**contents, SUMS: sums.encode()}


def _page(document: Mapping[str, Any], registry: bytes) -> str:
    from jinja2 import Environment, PackageLoader, select_autoescape

    loader = PackageLoader("cluster.report.dossier", ".")
    environment = Environment(loader=loader, autoescape=select_autoescape(default=True))
    shown = [
        (section["title"], [{name: printable(value) for name, value in one.items()} for one in section["sentences"]])
        for section in document["sections"]
    ]
    return environment.get_template("dossier.html.j2").render(
        name=printable(document["run"]), sections=shown, digests=document["files"], registry=registry.decode()
    )


def _check_form(content: bytes, path: Path) -> None:
    form = json_object(content, str(path)).get("form")
    if type(form) is not int or form != FORM:
        raise InputError(f"{path}: form is {form!r}, this Siloweave reads {FORM}; verify it with the one that made it")


def _check_sums(there: Mapping[str, bytes], folder: Path) -> None:
    """Names the file that has changed, which a comparison with what is written again could not always."""
    listed = [line.split("  ", 1) for line in there[SUMS].decode(errors="replace").splitlines()]
    for digest, name in (one for one in listed if len(one) == 2):
        if name in there and digest != digest_bytes(there[name]):
            raise InputError(f"{folder / name}: not the file that {SUMS} lists: one of the two was edited")


def _read(path: Path, fix: str) -> bytes:
    with reading(path, fix):
        if path.stat().st_size > _LARGEST_BYTES:
            raise InputError(f"{path}: larger than any file of a dossier; {fix}")
        return path.read_bytes()


def _put(contents: Mapping[str, bytes], target: Path) -> None:
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        for name, content in contents.items():
            write_atomic(fresh / name, content)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _encoded(tree: object) -> bytes:
    return json.dumps(tree, indent=1, sort_keys=True).encode() + b"\n"
