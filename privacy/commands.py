"""``siloweave ledger``: look at a ledger, check it and what was certified from it, copy it; without the silo."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from configs.errors import InputError, SiloweaveError
from configs.printing import answer, say
from configs.storage.layout import SiloFiles

ledger_app = typer.Typer(help="Shows, verifies and copies a silo's ledger.", no_args_is_help=True)
ANCHOR_AGREES = "agrees"
_NO_ENTRY = (LookupError, TypeError, ValueError, ArithmeticError, OSError)  # OSError: a time beyond all calendars
LedgerArgument = Annotated[
    Path, typer.Argument(help="A ledger.sqlite, the state_dir that holds it, or an export (*.jsonl).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
KeyOption = Annotated[
    str, typer.Option("--key-file", help="The key's file of an encrypted export. Default: SILOWEAVE_ENCRYPTION_KEY.")
]
ToOption = Annotated[Path, typer.Option("--to", help="The new file; nothing is overwritten.")]


@ledger_app.command()
def show(ledger: LedgerArgument, key_file: KeyOption = "", as_json: JsonOption = False) -> None:
    """Every entry, and what is left. Of a ledger that doesn't hold, what can be read; the exit status is 2, then."""
    from privacy.ledger.chain import body_of, holding, left
    from privacy.ledger.file import readable

    path = _file(ledger)
    entries, problem = readable(path, key_file)
    if not entries:
        raise problem or InputError(f"{path}: no entry; give a ledger that was opened")
    bodies = holding(entries)
    if problem is not None or len(bodies) < len(entries):
        after = [body_of(entry) for entry in entries[len(bodies) :]]
        _show_broken(path, bodies, after, problem, as_json)
    try:
        remaining = left(bodies)
        lines = [_entry_line(body) for body in bodies]
    except _NO_ENTRY:
        lacks = "an entry lacks a field, or has one of another type; `siloweave ledger verify` says which"
        raise InputError(f"{ledger}: {lacks}") from None
    document = {"entries": bodies, "epsilon_left": remaining.epsilon, "delta_left": remaining.delta}
    answer(as_json, document, *lines, f"left: epsilon {remaining.epsilon:.4g}, delta {remaining.delta:.3g}")


def _show_broken(
    path: Path, bodies: list[dict[str, Any]], after: list[dict[str, Any]], problem: SiloweaveError | None, as_json: bool
) -> NoReturn:
    """Shows what holds, and apart from it what follows, of which nothing is proven; says where the chain breaks."""
    said = f"{path}: entry {len(bodies) + 1} does not hold or can't be read: do not trust this ledger from there on"
    said += f" ({problem})" if problem is not None else "; put its backup back"
    document = {"sound": False, "entries": bodies, "not_proven": after, "problem": said}
    lines = [*map(_tried_line, bodies), *(f"not proven: {_tried_line(body)}" for body in after)]
    answer(as_json, document, *lines)
    say(f"error: {' '.join(said.split())}", err=True)
    raise typer.Exit(problem.exit_status if problem is not None else InputError.exit_status)


def _tried_line(body: dict[str, Any]) -> str:
    try:
        return _entry_line(body)
    except _NO_ENTRY:
        return "an entry that can't be read"


def _entry_line(body: dict[str, Any]) -> str:
    when = datetime.fromtimestamp(body["time"], tz=UTC).strftime("%Y-%m-%d %H:%M:%S")
    return f"{body['number']:>5}  {when}  {body['kind']:<10}{_summary(body)}"


@ledger_app.command()
def verify(
    ledger: Annotated[
        Path | None, typer.Argument(help="A ledger.sqlite, its state_dir, or an export (*.jsonl).")
    ] = None,
    certificate: Annotated[Path | None, typer.Option(help="A certificate.json, to be replayed, too.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="A folder: is it the adapter or the base model of the certificate?")
    ] = None,
    key_file: KeyOption = "",
    as_json: JsonOption = False,
) -> None:
    """Replays numbers, chain, signatures and claims of a ledger or a certificate. Exit status 2 if one doesn't hold.

    With both, the ledger has to hold the certificate's run as its silo stated it, and every release of that silo that
    the certificate's model was made of. A folder has to be the certificate's model, byte for byte.
    """
    if ledger is None and certificate is None:
        raise InputError("ledger verify: nothing to verify; give a ledger, --certificate FILE, or both")
    if model is not None and certificate is None:
        raise InputError(f"ledger verify: {model}: which certificate's model? give --certificate FILE, too")
    from privacy.certificate.certificate import ledgers_of

    document = _certificate(certificate) if certificate else None
    results: dict[str, Any] = {"sound": True}
    if ledger is not None:
        results |= _replayed(ledger, key_file)
    if document is not None:
        results |= {"unit": document["unit"], "headline": document["headline"], "silos": list(ledgers_of(document))}
        model_part = document.get("model") or {}
        rounds, results["continues"] = model_part.get("rounds", []), model_part.get("continues")
        results["rounds_without_releases"] = [
            at for at, one in enumerate(rounds, 1) if not one["releases"] and "updates" not in one
        ]
        if ledger is not None:
            results["silo"] = _in_ledger(document, ledger, key_file, str(certificate))
        if model is not None:
            results["model"] = _which_model(document, model, key_file, str(certificate))
    lines = _lines(results, ledger, certificate)
    lines += [f"{model}: is the certificate's {results['model']}"] if model is not None else []
    answer(as_json, results, *lines)


@ledger_app.command()
def export(ledger: LedgerArgument, to: ToOption, key_file: KeyOption = "", as_json: JsonOption = False) -> None:
    """Writes the entries as JSON lines, without seeds and replies; `ledger verify` reads them without the silo.

    They are encrypted where a key is given, or SILOWEAVE_ENCRYPTION_KEY is set.
    """
    from privacy.ledger.file import export as write

    _written(write(_file(ledger), to, key_file), to, as_json)


@ledger_app.command()
def backup(ledger: LedgerArgument, to: ToOption, as_json: JsonOption = False) -> None:
    """Copies a ledger in use, whole: a plain copy of the file may lack its last entries. Keys and seeds stay out."""
    from privacy.ledger.file import backup as write

    _written(write(_file(ledger), to), to, as_json)


def _written(entries: int, to: Path, as_json: bool) -> None:
    answer(as_json, {"file": str(to), "entries": entries}, f"{to}: {entries} entries")


def _file(ledger: Path) -> Path:
    return SiloFiles(ledger).ledger if ledger.is_dir() else ledger


def _verified(ledger: Path, key_file: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The entries' bodies and hashes, of a chain that holds."""
    from privacy.ledger.chain import verify_entries
    from privacy.ledger.file import read_only

    path = _file(ledger)
    entries = read_only(path, key_file)
    if not entries:
        raise InputError(f"{path}: no entry; give a ledger that was opened")
    return verify_entries(entries, str(path)), [entry["hash"] for entry in entries]


def _replayed(ledger: Path, key_file: str) -> dict[str, Any]:
    from privacy.ledger.chain import left
    from privacy.ledger.replay import replay

    bodies, hashes = _verified(ledger, key_file)
    replay(bodies, str(ledger))
    anchor = _anchored(ledger, bodies[0])
    remaining = left(bodies)
    return {
        "entries": len(bodies),
        "head": hashes[-1],
        "anchor": anchor,
        "later_entries_can_be_missing": anchor != ANCHOR_AGREES,
        "epsilon_left": remaining.epsilon,
        "delta_left": remaining.delta,
    }


def _anchored(ledger: Path, opening: dict[str, Any]) -> str:
    """Compares a ledger with the anchor beside its state_dir: what its silo would refuse is not sound.

    Raises:
        InputError: the anchor is damaged, or the ledger is behind it.
    """
    from privacy.ledger.anchor import Anchor
    from privacy.ledger.chain import History
    from privacy.ledger.file import read_only
    from privacy.ledger.journal import RECONCILE, default_anchor_dir

    path = _file(ledger)
    anchor = Anchor(default_anchor_dir(path.parent))
    if path != SiloFiles(path.parent).ledger or not anchor.path.exists():
        return "not there"
    owner = (opening["silo"], opening["dataset"], opening["public_key"])
    doubt = anchor.doubt(path, owner, lambda: History.of(read_only(path)), expected=False)
    if doubt is not None:
        raise InputError(f"{doubt}; the silo refuses everything until {RECONCILE} has been run")
    return ANCHOR_AGREES


def _certificate(path: Path) -> dict[str, Any]:
    from configs.parse import json_object
    from privacy.certificate.check import check_certificate

    try:
        document = json_object(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); give a run's certificate.json") from None
    check_certificate(document, str(path))
    return document


def _in_ledger(document: dict[str, Any], ledger: Path, key_file: str, origin: str) -> str:
    from privacy.certificate.check import check_in_ledger

    return check_in_ledger(document, *_verified(ledger, key_file), origin)


def _which_model(document: dict[str, Any], folder: Path, key_file: str, origin: str) -> str:
    from privacy.certificate.model_digests import ModelDigests, which_model
    from privacy.ledger.file import given_key

    if document.get("model") is None:
        raise InputError(f"{origin}: version {document['version']} names no model; nothing can be said of {folder}")
    return which_model(ModelDigests.model_validate(document["model"]), folder, given_key(key_file))


def _lines(results: dict[str, Any], ledger: Path | None, certificate: Path | None) -> list[str]:
    lines = []
    if ledger is not None:
        remaining = f"epsilon {results['epsilon_left']:.4g}, delta {results['delta_left']:.3g}"
        lines.append(f"{ledger}: {results['entries']} entries hold, head {results['head']}; left: {remaining}")
        if results["later_entries_can_be_missing"]:
            lines.append(
                f"{ledger}: no anchor to compare with, so later entries can be missing: compare the head with the "
                "silo's own, or with a newer receipt's"
            )
    if certificate is not None:
        claim = results["headline"]
        spent = f"epsilon {claim['epsilon']:.4g}, delta {claim['delta']:.3g} ({claim['rule']})"
        holds = (
            f"{len(results['silos'])} silos hold" if results["unit"] == "record" else "the aggregator's ledger holds"
        )
        lines.append(f"{certificate}: {holds}; {spent}")
    if earlier := results.get("continues"):
        lines.append(
            f"{certificate}: the model starts from what an earlier run has made; what that one spent comes on top, and "
            f"is in the certificate with SHA-256 {earlier}"
        )
    if unrecorded := results.get("rounds_without_releases"):
        rounds = ", ".join(map(str, unrecorded))
        lines.append(f"{certificate}: it doesn't say whose releases went into the model in rounds {rounds}")
    if "silo" in results:
        lines.append(f"{ledger}: the run of {results['silo']} is in its chain as it was stated")
    return lines


def _summary(body: dict[str, Any]) -> str:
    hidden = {"kind", "number", "time", "plan", "public_key", "spends", "receipts"}
    values = {name: value for name, value in body.items() if name not in hidden}
    return "  ".join(f"{name}={_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 40 else str(value)
