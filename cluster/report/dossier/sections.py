"""The sentences of a dossier, section by section: each is about one field that somebody has signed, or a digest."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.report.dossier.sources import AUDIT, COORDINATOR, Sentence, Sources, Traffic, cited
from privacy.certificate.certificate import NOT_AUDITED

FORM = 1  # a change of these words is a new form: verifying a dossier writes it again
Section = tuple[str, list[Sentence]]
_RELATION = {
    "add_or_remove_one": "two datasets are neighbouring if one has a unit more than the other (unbounded differential "
    "privacy)",
    "zero_out": "two datasets are neighbouring if all data of one unit is replaced by nothing",
}


def sections(sources: Sources) -> list[Section]:
    """All of them, in the order in which a committee asks."""
    return [
        ("What would leave", [*_model(sources)]),
        ("On whose data, by declaration", [*_data(sources)]),
        ("What left each site, and when", [*_traffic(sources)]),
        ("The guarantee, in the terms of NIST SP 800-226", [*_guarantee(sources)]),
        ("The answer to SATRE 3.3.07: outputs that cannot be checked by hand", [*_outputs(sources)]),
        ("Threats that are covered", [*_covered(sources)]),
        ("What is not covered", [*_not_covered(sources)]),
        ("The audit", [*_audit(sources)]),
        ("Who signed", [*_signatures(sources)]),
    ]


def _model(sources: Sources) -> Iterator[Sentence]:
    model, word = sources.certificate["model"], sources.word
    for name, digest in sorted(model["adapter"].items()):
        yield cited(f"The file {name} would leave; its SHA-256 is {digest}.", "model", "adapter", name)
    what = f"The task is {word.task}" + (f" with the labels {', '.join(word.labels)}" if word.labels else "")
    yield cited(f"{what}.", "task", file=COORDINATOR)
    yield cited(f"What has trained of the model is called {word.train} in the settings.", "train", file=COORDINATOR)
    yield cited(f"It was trained in {len(model['rounds'])} rounds.", "model", "rounds")
    base = f"It starts from the base model with content digest {model['base_model']}"
    yield cited(f"{base}.", "model", "base_model")
    if by := model.get("declared_public_by"):
        said = f"The owner of key {by} declares that public text alone has made the base model"
        yield cited(f"{said}.", "model", "declared_public_by")
    if earlier := model.get("continues"):
        said = f"It goes on from an earlier run, whose certificate has SHA-256 {earlier} and whose epsilon comes on top"
        yield cited(f"{said}.", "model", "continues")


def _data(sources: Sources) -> Iterator[Sentence]:
    clients = sources.certificate["unit"] == "client"
    for name, ledger in sources.ledgers.items():
        at, count = sources.path_of(name), ledger["public_record_count"]
        if clients:
            yield cited(f"{count} clients took part; the ledger is the aggregator's.", *at, "receipt")
            continue
        yield cited(
            f"{name} trained on its dataset {ledger['dataset_id']}; its steward declares {count} training units, a "
            "number that was never counted from the data.",
            *at,
            "receipt",
            "public_record_count",
        )
        if (statement := ledger.get("statement")) is not None:
            says = "states" if statement["attests_disjoint_units"] else "does not state"
            said = f"The steward of {name} {says} that its units are in no other silo"
            yield cited(f"{said}.", *at, "statement", "attests_disjoint_units")
        if "mandate" in ledger:
            yield from _mandate(name, ledger["mandate"]["terms"], (*at, "mandate"))
        else:
            yield cited(f"{name} has signed no mandate for this run.", *at, "receipt")
    for name, part in sources.clients.items():
        yield from _mandate(name, part["mandate"]["terms"], ("mandates", name, "mandate"))


def _mandate(name: str, terms: Mapping[str, Any], at: tuple[str, ...]) -> Iterator[Sentence]:
    purpose = f"{name} was asked in the name of the study {terms['study']}, whose purpose is: {terms['purpose']}"
    yield cited(f"{purpose}.", *at, "terms", "purpose")
    who = f"{name} agreed that these may be given the model: {'; '.join(terms['recipients'])}"
    yield cited(f"{who}.", *at, "terms", "recipients")
    last = f"{name} agreed until {terms['expires']}, for coordinator {terms['coordinator']}"
    yield cited(f"{last}.", *at, "terms", "expires")
    most = f"All runs of the study together may spend epsilon {terms['budget_epsilon']:g} of {name}"
    yield cited(f"{most}.", *at, "terms", "budget_epsilon")


def _traffic(sources: Sources) -> Iterator[Sentence]:
    certificate = sources.certificate
    yield cited(f"What may have left each site: {certificate['left_each_silo']}.", "left_each_silo")
    for name, ledger in sources.ledgers.items():
        at, statement = sources.path_of(name), ledger.get("statement")
        if statement is None:
            said = f"{name} has not stated how many rounds it charged: it did not answer the close"
            yield cited(f"{said}.", *at, "receipt")
        else:
            said = f"{name} charged {statement['rounds_charged']} rounds, each of which may have left"
            yield cited(f"{said}.", *at, "statement", "rounds_charged")
    told = {traffic.round: place for place, traffic in enumerate(sources.word.rounds)}
    for number, one in enumerate(certificate["model"]["rounds"]):
        if (place := told.get(number + 1)) is not None:
            yield _ended(sources.word.rounds[place], place)
        yield from _releases(number, one)


def _ended(traffic: Traffic, place: int) -> Sentence:
    ended = traffic.ended.isoformat(timespec="seconds")
    said = f"Round {traffic.round} ended at {ended} and moved {traffic.moved_bytes:,} bytes both ways together"
    return cited(f"{said}.", "rounds", place, file=COORDINATOR)


def _releases(number: int, one: Mapping[str, object]) -> Iterator[Sentence]:
    releases, updates = one["releases"], one.get("updates", [])
    for name, digest in sorted(releases.items()) if isinstance(releases, dict) else ():
        said = f"In round {number + 1} a reply of {name} went into the model; its SHA-256 is {digest}"
        yield cited(f"{said}.", "model", "rounds", number, "releases", name)
    for place, update in enumerate(updates if isinstance(updates, list) else ()):
        said = f"In step {number + 1} a reply of {update['silo']} went in; its SHA-256 is {update['digest']}"
        yield cited(f"{said}.", "model", "rounds", number, "updates", place)


def _guarantee(sources: Sources) -> Iterator[Sentence]:
    certificate = sources.certificate
    plan, claim = certificate["plan"], certificate["headline"]
    epsilon, delta = claim["epsilon"], claim["delta"]
    yield cited(
        f"The run satisfies (epsilon, delta)-differential privacy with the privacy parameters epsilon {epsilon:.4g} "
        f"and delta {delta:g}.",
        "headline",
    )
    yield cited(
        "Whatever somebody believed of one unit, seeing all that was released changes the odds by a factor of at most "
        f"{_factor(epsilon)}, but for a probability of {delta:g}.",
        "headline",
        "epsilon",
    )
    unit = "one training unit of a silo (a record, or all records of one person where the silo groups them)"
    protects = unit if certificate["unit"] == "record" else "all data of one client"
    yield cited(f"The unit of privacy is {protects}.", "unit")
    yield cited(f"For the guarantee, {_RELATION[certificate['relation']]}.", "relation")
    yield cited(
        f"The mechanism is the Gaussian one on clipped sums (DP-SGD): norm {plan['max_grad_norm']:g}, noise multiplier "
        f"{plan['noise_multiplier']:g}, sampling rate {plan['sampling_rate']:g}, "
        f"{plan['rounds'] * plan['steps_per_round']} noised sums.",
        "plan",
    )
    accountant = f"Composition over the whole run is accounted by {certificate['accountant']}"
    yield cited(f"{accountant}, and the larger bound counts.", "accountant")
    yield cited(f"Over the ledgers the claim is the {claim['rule']}.", "headline", "rule")
    if trusted := certificate.get("trusted"):
        yield cited(f"The trust model: trusted is {trusted}.", "trusted")
    else:
        yield cited(
            "The trust model: each site is trusted with its own records and adds the noise before anything leaves; the "
            "coordinator, the other sites and everybody who sees the model are not trusted.",
            "left_each_silo",
        )
    for name, ledger in sources.ledgers.items():
        left = f"After this run, {name} has a privacy budget of epsilon {ledger['receipt']['epsilon_left']:.4g} left"
        yield cited(f"{left}.", *sources.path_of(name), "receipt", "epsilon_left")
    yield cited("The randomness of the noise: {}.".format(certificate["seeds"]), "seeds")
    yield cited(
        "Whatever is done with these files later is post-processing, and spends no more of this guarantee.",
        "model",
        "adapter",
    )
    yield cited(
        "Side channels, access to the sites' machines and how their data were collected lie below this guarantee: it "
        "says nothing of them, and section 7 lists what is known.",
        "not_covered",
    )
    yield cited("SP 800-226 names no epsilon that is small enough for all: that is for the committee.", "headline")


def _factor(epsilon: float) -> str:
    return f"{math.exp(epsilon):.4g}" if epsilon < 700 else "any"


def _outputs(sources: Sources) -> Iterator[Sentence]:
    yield cited("The output is weights of a model, which nobody can check by reading them.", "model", "adapter")
    yield cited(
        "The first technical control is the guarantee above: it bounds what the files can tell of any one unit, "
        "whoever reads them and whatever else they know.",
        "epsilon",
    )
    for name, ledger in sources.ledgers.items():
        at, receipt = sources.path_of(name), ledger["receipt"]
        yield cited(
            f"The second one, at {name}: its ledger has charged the run before anything left; its entry "
            f"{receipt['number']} has the hash {receipt['head']}.",
            *at,
            "receipt",
            "head",
        )
        if "mandate" in ledger:
            yield _third(name, *at)
    for name in sources.clients:
        yield _third(name, "mandates", name)
    yield cited(
        "What leaves is known by its digests: a file that is not among them is another model.", "model", "adapter"
    )
    yield cited(
        "Whether it may leave is decided by people: nothing in this folder approves it, and SATRE asks for such a "
        "policy, not for this answer to it.",
        "plan_digest",
    )


def _third(name: str, *at: str) -> Sentence:
    said = f"The third one, at {name}: its steward's mandate covers the run's plan, as every check computes anew"
    return cited(f"{said}.", *at, "mandate", "terms")


def _covered(sources: Sources) -> Iterator[Sentence]:
    certificate = sources.certificate
    yield cited(
        "Membership inference, reconstruction and any other attack on one unit by whoever has the model or all "
        "that the sites released: bounded by epsilon.",
        "epsilon",
    )
    yield cited(
        "Runs that are repeated until something leaks: each adds up in the ledgers, which refuse beyond their budget.",
        *sources.path_of(next(iter(sources.ledgers))),
        "receipt",
        "spends",
    )
    yield cited("Numbers that were made better afterwards: they are computed again from what is signed.", "plan_digest")
    yield cited("Another model under this certificate: its files have other digests.", "model", "adapter")
    if certificate["unit"] == "record":
        yield cited("A coordinator that reads everything: what it gets has its noise already.", "left_each_silo")


def _not_covered(sources: Sources) -> Iterator[Sentence]:
    for number, line in enumerate(sources.certificate["not_covered"]):
        yield cited(f"{line[:1].upper()}{line[1:]}.", "not_covered", number)
    yield cited(
        "What many people in the data have in common may be learnt: that is what a model is for, and no guarantee "
        "about one unit covers it.",
        "unit",
    )
    yield cited(
        "When rounds ended and what they moved: nobody but the coordinator says so.", "rounds", file=COORDINATOR
    )


def _audit(sources: Sources) -> Iterator[Sentence]:
    if sources.audit is None:
        yield cited("No audit of this run lies beside it.", "audited")
        return
    found = sources.audit["audited"]
    if found == NOT_AUDITED:
        yield cited("The audit's certificate holds no audit.", "audited", file=AUDIT)
        return
    lower = found["epsilon_lower_bound_95"]
    said = f"Attacks on canaries show that epsilon is at least {lower:.4g} (95% confidence), and the claim is larger"
    yield cited(f"{said}.", "audited", "epsilon_lower_bound_95", file=AUDIT)
    yield cited(f"What was audited: {found['of']}.", "audited", "of", file=AUDIT)


def _signatures(sources: Sources) -> Iterator[Sentence]:
    for name, ledger in sources.ledgers.items():
        yield _signature(name, ledger, *sources.path_of(name))
    for name, part in sources.clients.items():
        yield _signature(name, part, "mandates", name)
    yield cited("The coordinator signs nothing of this.", "run", file=COORDINATOR)


def _signature(name: str, signed: Mapping[str, Any], *at: str) -> Sentence:
    parts = [part for part in ("receipt", "statement", "mandate") if part in signed]
    said = f"{name} signed its {', '.join(parts)} with key {signed['public_key']}"
    return cited(f"{said}: compare it with what its steward reads out.", *at, "receipt", "signature")
