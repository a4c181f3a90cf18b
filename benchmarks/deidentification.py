"""What de-identification finds, and what it takes by mistake: precision and recall by kind on generated notes.

python benchmarks/deidentification.py --json deidentification.json

The notes are made from templates around identifiers with right check digits, and around things that only look like
identifiers. Half of the people are in the list of names that is given; the others are there to show what a list misses.
Real text is harder: take these figures as an upper bound.
"""

import argparse
import json
import math
import random
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from figures import setting, spread

from configs.schema.data import DeidentifySettings
from trainer.data.deidentify import Deidentifier

LISTED = ["Amara Okafor", "Jonas Lindqvist", "Mei-Ling Zhao", "O'Brien", "Petrova", "Hadley", "Ruiz", "Nakamura"]
UNLISTED = ["Theodora Blum", "Castellane", "Wrzesniewski", "Abernathy"]
FIRST, LAST = ["j", "anna", "m.k", "dr_lee"], ["doe", "smith-jones", "okafor", "ruiz99"]
TEMPLATES = [
    "Pt {PERSON}, MRN: {MEDICAL_RECORD_NUMBER}, seen {DATE_TIME} for chest pain, BP 120/80, pain 5/10.",
    "{PERSON} called from {PHONE_NUMBER} about the results of {DATE_TIME}; will call again.",
    "Send the letter to {EMAIL_ADDRESS} or see {URL} for the form.",
    "NHS number {UK_NHS}. Referred by Dr. {PERSON} and/or the ward.",
    "Her social security number is {US_SSN}; born {DATE_TIME}.",
    "Refund to IBAN {IBAN_CODE}, or to the card {CREDIT_CARD}, said {PERSON}.",
    "Portal log-in from {IP_ADDRESS} on {DATE_TIME}.",
    "Medical record number {MEDICAL_RECORD_NUMBER}: E11.9, HbA1c 7.2%, 40 mg twice a day, room 12.",
    "Fax {PHONE_NUMBER}, mail {EMAIL_ADDRESS}.",
    "{PERSON}'s insurance number (NI) {UK_NINO} was checked on {DATE_TIME}.",
]
DECOYS = [
    "The path os.path.name is set in version 3.11.4, ratio 1:2:3, and pain.It went away.",
    "She may march in; we will mark the chart. Temperature 37.2, pulse 88, SpO2 97% on 2 l/min.",
    "Platelets 150000, order 4711, ward 7B, 3/4 of the dose; sodium 140, potassium 4.1.",
    "WBC 12.5, 1000 ml in 24 h, repeat in 6 weeks; TP53 and BRCA1 are wild type.",
    "Reference 1234567 was not found; see chapter 12, section 3, pages 100-120.",
]


@dataclass(frozen=True)
class Note:
    """A text and what identifies in it: (start, end, kind, whether a list of names could know it)."""

    text: str
    spans: tuple[tuple[int, int, str], ...]


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices("0123456789", k=count))


def _card(rng: random.Random) -> str:
    body = "4" + _digits(rng, 14)
    total = sum(sum(divmod(int(d) * (2 - i % 2), 10)) for i, d in enumerate(body))
    number = body + str(-total % 10)
    return rng.choice(["", " ", "-"]).join(number[i : i + 4] for i in range(0, 16, 4))


def _iban(rng: random.Random) -> str:
    bban = _digits(rng, 18)
    check = 98 - int(bban + "131400") % 97
    iban = f"DE{check:02}{bban}"
    return rng.choice([iban, " ".join(iban[i : i + 4] for i in range(0, len(iban), 4))])


def _nhs(rng: random.Random) -> str:
    while True:
        body = "9" + _digits(rng, 8)
        check = -sum(int(d) * weight for d, weight in zip(body, range(10, 1, -1), strict=True)) % 11
        if check < 10:
            number = body + str(check)
            return rng.choice([number, f"{number[:3]} {number[3:6]} {number[6:]}"])


def _date(rng: random.Random) -> str:
    day = date(1930, 1, 1) + timedelta(days=rng.randrange(34_000))
    forms = ["%Y-%m-%d", "%d/%m/%Y", "%m/%d/%y", "%d.%m.%Y", "%B %d, %Y", "%d %b %Y", "%d-%b-%Y"]
    return day.strftime(rng.choice(forms))


MAKERS: dict[str, Callable[[random.Random], str]] = {
    "MEDICAL_RECORD_NUMBER": lambda rng: rng.choice(["", "A", "H-"]) + _digits(rng, rng.randint(6, 9)),
    "DATE_TIME": _date,
    "PHONE_NUMBER": lambda rng: rng.choice(
        [
            f"(212) 555-{rng.randint(100, 199):04}",
            f"+1 415 555 {rng.randint(100, 199):04}",
            f"+44 20 7946 {rng.randint(100, 999):04}",
            f"617-555-{rng.randint(100, 199):04}",
        ]
    ),
    "EMAIL_ADDRESS": lambda rng: (
        f"{rng.choice(FIRST)}.{rng.choice(LAST)}@{rng.choice(['example.org', 'ward.hospital.internal', 'mail.co.uk'])}"
    ),
    "URL": lambda rng: rng.choice(
        [
            f"https://portal.example.org/p/{_digits(rng, 5)}?q=1",
            f"http://intranet/ward/{_digits(rng, 3)}",
            "www.example.com",
            f"example.net/notes/{_digits(rng, 4)}",
        ]
    ),
    "UK_NHS": _nhs,
    "UK_NINO": lambda rng: f"AB {_digits(rng, 2)} {_digits(rng, 2)} {_digits(rng, 2)} C",
    "US_SSN": lambda rng: f"{rng.randint(100, 665)}-{rng.randint(10, 99)}-{rng.randint(1000, 9999)}",
    "IBAN_CODE": _iban,
    "CREDIT_CARD": _card,
    "IP_ADDRESS": lambda rng: rng.choice(
        [".".join(str(rng.randint(1, 254)) for _ in range(4)), f"2001:db8:85a3::8a2e:{rng.randint(1, 9999)}:7334"]
    ),
}


def notes(count: int, seed: int) -> list[Note]:
    """Generated notes; people of the list and others are the kinds ``PERSON`` and ``PERSON (not in the list)``."""
    rng = random.Random(seed)
    return [_note(rng, rng.choice(TEMPLATES if rng.random() < 0.8 else DECOYS)) for _ in range(count)]


def _note(rng: random.Random, template: str) -> Note:
    text, spans = "", []
    for part in re.split(r"(\{\w+\})", template):
        if not part.startswith("{"):
            text += part
            continue
        kind = part[1:-1]
        if kind == "PERSON":
            listed = rng.random() < 0.5
            value, kind = rng.choice(LISTED if listed else UNLISTED), kind if listed else "PERSON (not in the list)"
        else:
            value = MAKERS[kind](rng)
        spans.append((len(text), len(text) + len(value), kind))
        text += value
    return Note(text, tuple(spans))


def replaced_spans(before: str, after: str) -> list[tuple[int, int, str]]:
    """What was replaced, found again from the two texts."""
    kinds = re.findall(r"<([A-Z_]+)>", after)
    literals = re.split(r"<[A-Z_]+>", after)
    match = re.fullmatch("(.+?)".join(re.escape(literal) for literal in literals), before, flags=re.DOTALL)
    if match is None:
        raise ValueError(f"{after!r} is not {before!r} with spans replaced")
    return [(*match.span(number), kind) for number, kind in enumerate(kinds, 1)]


def measure(examples: list[Note], results: list[str]) -> dict[str, dict[str, float]]:
    """By kind: how many there are, recall (found whole, as this kind), removed (whole, as any kind), precision."""
    there, found, removed, said, right = (Counter[str]() for _ in range(5))
    for note, result in zip(examples, results, strict=True):
        spans = replaced_spans(note.text, result)
        for start, end, kind in note.spans:
            covers = [as_kind for a, b, as_kind in spans if a <= start and end <= b]
            there[kind] += 1
            found[kind] += kind.split(" ")[0] in covers
            removed[kind] += bool(covers)
        for start, end, kind in spans:
            said[kind] += 1
            right[kind] += any(a < end and start < b and k.split(" ")[0] == kind for a, b, k in note.spans)
    return {
        kind: {
            "examples": there[kind],
            "recall": found[kind] / there[kind] if there[kind] else float("nan"),
            "removed": removed[kind] / there[kind] if there[kind] else float("nan"),
            "precision": right[kind] / said[kind] if said[kind] else float("nan"),
        }
        for kind in sorted(there | said)
    }


def open_with_names(folder: Path) -> Deidentifier:
    """A deidentifier that knows half of the people."""
    (folder / "names.txt").write_text("\n".join(LISTED), encoding="utf-8")
    return Deidentifier(DeidentifySettings(enabled=True, names_file=str(folder / "names.txt")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--notes", type=int, default=1000, help="Notes a repetition.")
    parser.add_argument("--repetitions", type=int, default=3, help="Each with a seed of its own.")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    speeds = []
    with tempfile.TemporaryDirectory() as folder:
        deidentify = open_with_names(Path(folder))
        for seed in range(arguments.repetitions):
            examples = notes(arguments.notes, seed)
            began = time.perf_counter()
            results = [deidentify(note.text) for note in examples]
            speeds.append(sum(len(note.text) for note in examples) / (time.perf_counter() - began))
            for kind, figures in measure(examples, results).items():
                for name, value in figures.items():
                    values[kind][name].append(value)
    figures = {kind: {name: _spread(found) for name, found in rows.items()} for kind, rows in values.items()}
    document = {
        **setting(("presidio-analyzer", "presidio-anonymizer", "spacy")),
        "notes": arguments.notes,
        "repetitions": arguments.repetitions,
        "figures": figures,
        "characters_per_s": _spread(speeds),
    }
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    print(f"{'kind':<28}{'examples':>9}{'recall':>9}{'removed':>9}{'precision':>10}")
    for kind, rows in figures.items():
        shown = [_shown(rows[name]) for name in ("recall", "removed", "precision")]
        print(f"{kind:<28}{rows['examples']['median'] or 0:>9.0f}{shown[0]:>9}{shown[1]:>9}{shown[2]:>10}")
    print(f"{document['characters_per_s']['median']:,.0f} characters/s")


def _spread(found: list[float]) -> dict[str, Any]:
    """Median, minimum and maximum; null where there was nothing to count (a kind without examples, or never said)."""
    known = [value for value in found if not math.isnan(value)]
    return spread(known) if known else {"median": None, "minimum": None, "maximum": None}


def _shown(spread: dict[str, Any]) -> str:
    return "-" if spread["median"] is None else f"{spread['median']:.3f}"


if __name__ == "__main__":
    main()
