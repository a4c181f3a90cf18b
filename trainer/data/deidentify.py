"""De-identification of text by Presidio: hygiene before training. It is NOT differential privacy, and misses things.

A span that looks like an identifier becomes ``<KIND>``. Patterns find identifiers that have a form; names need a list
or a spaCy model that the user has. Each text is treated alone: what another record holds changes nothing. Nothing is
ever downloaded, and what Presidio would pass over (a pattern that takes too long) ends the run.

Presidio's work grows with the square of a text's length on text that is made for it, and often on text that isn't. So
a long text is read through windows of a fixed size, each of which begins a little before the last one's end.
"""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from configs.errors import InputError, SiloweaveError
from configs.schema.data import DeidentifySettings
from configs.storage.files import digest_bytes, digest_json
from trainer.data.cleaning import UNSPACED

MIN_SCORE = 0.4
WINDOW, LOOK_BACK = 2048, 256  # characters that a call of Presidio sees for the first time, and for the second
LONGEST = 256  # characters; a longer identifier is found too, but its span may go on to the next space
_RULES = 3  # version of what this file finds; raise it where it finds something else
_LANGUAGE = "en"
_MONTH = (
    "(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sep(?:t(?:ember)?)?|Oct(?:ober)?|"
    "Nov(?:ember)?|Dec(?:ember)?)"
)
_DAY = r"(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?"
_DATES_IN_WORDS = (
    rf"\b{_DAY}(?: of)? {_MONTH}\.?(?:,? \d{{4}})?\b",
    rf"\b{_MONTH}\.? {_DAY}(?:,? \d{{4}})?\b",
)
# Presidio's own patterns take "pain.It" and "os.name" for web sites, and don't know "https://intranet/ward".
_URLS = (
    r"\b(?:https?|ftps?)://[^\s()<>\"']+(?<![.,;:!?])",
    r"\bwww\d{0,3}\.[\w.-]+\.[a-z]{2,}(?:/[^\s()<>\"']*)?(?<![.,;:!?])",
    r"\b(?:[a-z0-9-]+\.)+[a-z]{2,}/[^\s()<>\"']*(?<![.,;:!?])",
)
# What may stand in a written name: typesetters' apostrophes and hyphens, and characters that are not seen.
_TYPEWRITER = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201b\u02bc\u02b9\u2032\u00b4`", "'")
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-")
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u2060\ufeff", "")
)
_CLUSTER = re.compile(r".[\u0300-\u036f]*", re.DOTALL)
_SPACE_OR_END = re.compile(r"\s|$")


class Deidentifier:
    """Replaces identifiers, text by text.

    Attributes:
        digest: of everything that shapes the result: settings, names, model, versions.
        counts: spans replaced so far, by kind. Exact: of private text it is for the steward's eyes only.

    Raises:
        InputError: the extra is not installed, or the names, the model, a country or the pattern can't be used.
    """

    def __init__(self, settings: DeidentifySettings) -> None:
        self._settings = settings
        self._analyzer, self._anonymizer, self.digest = _engines(settings)
        self.counts: Counter[str] = Counter()

    def __reduce__(self) -> tuple[type["Deidentifier"], tuple[DeidentifySettings]]:
        return Deidentifier, (self._settings,)  # another process opens its own

    def __call__(self, text: str) -> str:
        """The text with ``<KIND>`` in place of each identifier found.

        Raises:
            SiloweaveError: Presidio failed on it, or a pattern took too long. The message holds nothing of the text.
        """
        try:
            return self._replace(text)
        except Exception as error:
            # Not chained: Presidio's messages quote the text.
            raise SiloweaveError(f"de-identification failed on a record ({type(error).__name__})") from None

    def _replace(self, text: str) -> str:
        pieces, start = [], 0
        while start < len(text):
            piece, start = self._replace_window(text, start)
            pieces.append(piece)
        return "".join(pieces)

    def _replace_window(self, text: str, start: int) -> tuple[str, int]:
        """The text from ``start`` on, treated, and where the next window starts."""
        from presidio_anonymizer.entities import ConflictResolutionStrategy, RecognizerResult

        before, end = max(0, start - LOOK_BACK), min(start + WINDOW, len(text))
        found = [
            RecognizerResult(result.entity_type, result.start + before, result.end + before, result.score)
            for result in self._find(text[before:end])
        ]
        stop = _stop(text, end, [(result.start, result.end) for result in found])
        inside = [
            RecognizerResult(result.entity_type, max(result.start, start) - start, last - start, result.score)
            for result in found
            if (last := stop if result.end == end else min(result.end, stop)) > max(result.start, start)
        ]
        # Of two that overlap the better keeps its span and the other gives way: no part of either stays.
        treated = self._anonymizer.anonymize(
            text[start:stop], inside, conflict_resolution=ConflictResolutionStrategy.REMOVE_INTERSECTIONS
        )
        self.counts.update(item.entity_type for item in treated.items)
        return str(treated.text), stop

    def _find(self, text: str) -> list[Any]:
        from presidio_analyzer.nlp_engine import NlpArtifacts

        engine = self._analyzer.nlp_engine
        artifacts = engine.process_text(text, _LANGUAGE)
        # A blank pipeline has no lemmas; Presidio looks for context ("phone", "passport") among them.
        artifacts.lemmas = [token.lower_ for token in artifacts.tokens]
        artifacts.keywords = NlpArtifacts.set_keywords(engine, artifacts.lemmas, _LANGUAGE)
        found: list[Any] = self._analyzer.analyze(text, _LANGUAGE, score_threshold=MIN_SCORE, nlp_artifacts=artifacts)
        return found


def _stop(text: str, end: int, found: Sequence[tuple[int, int]]) -> int:
    """Where the treatment of a window that ends at ``end`` stops, so that no identifier is cut in two.

    That is a place inside no finding, a space if there is one, and so far before the end that an identifier around it
    would have been found. Where findings leave no such place, the end of the last of them is taken; where that is the
    window's end, the next space after it is.
    """
    if end == len(text):
        return end
    places = range(end - 2 * LONGEST, end - LONGEST)
    taken = {place for first, last in found for place in range(max(first + 1, places.start), min(last, places.stop))}
    free = [place for place in places if place not in taken]
    if free:
        return next((place for place in free if text[place].isspace()), free[0])
    last = max(last for first, last in found if first < places.stop)
    return last if last < end else _SPACE_OR_END.search(text, end).start()  # type: ignore[union-attr]  # $ is found


def open_deidentifier(settings: DeidentifySettings) -> Deidentifier | None:
    """A fresh deidentifier, its counts at zero; None where the settings don't ask for one.

    Raises:
        InputError: see ``Deidentifier``.
    """
    return Deidentifier(settings) if settings.enabled else None


@lru_cache(maxsize=1)
def _engines(settings: DeidentifySettings) -> tuple[Any, Any, str]:
    """(analyzer, anonymizer, digest), built once for all silos that a process hosts."""
    try:
        from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
        from presidio_anonymizer import AnonymizerEngine
    except ImportError:
        raise InputError(
            "data.deidentify.enabled is true: Presidio is not installed; `pip install 'siloweave[deid]'`, or set it to "
            "false"
        ) from None
    _fail_on_timeouts()
    names = _read_names(settings.names_file)
    engine, model = _nlp_engine(settings.spacy_model)
    recognizers = [*_generic(settings), *_national(settings.countries), *_person(names, bool(settings.spacy_model))]
    registry = RecognizerRegistry(recognizers=recognizers, supported_languages=[_LANGUAGE])
    analyzer = AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=[_LANGUAGE])
    shaping = settings.model_dump(exclude={"enabled", "names_file"})
    versions = {name: version(name) for name in ("presidio-analyzer", "presidio-anonymizer", "spacy", "phonenumbers")}
    return (
        analyzer,
        AnonymizerEngine(),
        digest_json([_RULES, shaping, digest_bytes("\n".join(names).encode()), model, versions]),
    )


def _fail_on_timeouts() -> None:
    """Presidio logs a pattern that takes too long and goes on without it: the text would pass unseen."""
    logger = logging.getLogger("presidio-analyzer")
    logger.setLevel(logging.WARNING)  # what it says below that quotes the text
    if _raise_on_timeout not in logger.filters:
        logger.addFilter(_raise_on_timeout)


def _raise_on_timeout(record: logging.LogRecord) -> bool:
    if "timed out" in record.msg:
        raise TimeoutError
    return True


def _read_names(file: str) -> list[str]:
    """Names, one per line, longest first: a regular expression takes the first that fits."""
    if not file:
        return []
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.deidentify.names_file {file}: can't be read ({error})") from None
    names = {line.strip() for line in lines if line.strip()}
    if not names:
        raise InputError(f"data.deidentify.names_file {file}: holds no name; give one per line")
    return sorted(names, key=lambda name: (-len(name), name))


def _nlp_engine(model: str) -> tuple[Any, str]:
    """A spaCy engine that has been given its pipeline, so that Presidio never looks for one to download."""
    import spacy
    from presidio_analyzer.nlp_engine import SpacyNlpEngine

    if model and not (spacy.util.is_package(model) or Path(model).is_dir()):
        raise InputError(
            f"data.deidentify.spacy_model is {model!r}: not installed here and no folder; install it (nothing is "
            'downloaded by Siloweave), or set it to ""'
        )
    pipeline = spacy.load(model) if model else spacy.blank(_LANGUAGE)
    pipeline.max_length = 2**40  # spaCy's limit is for models that hold a text in memory; no text is refused here
    engine = SpacyNlpEngine(models=[{"lang_code": _LANGUAGE, "model_name": model}])
    engine.nlp = {_LANGUAGE: pipeline}
    return engine, f"{pipeline.meta['name']} {pipeline.meta['version']}" if model else ""


def _generic(settings: DeidentifySettings) -> list[Any]:
    import regex
    from presidio_analyzer import Pattern, PatternRecognizer
    from presidio_analyzer import predefined_recognizers as known

    try:
        regex.compile(settings.medical_record_pattern)
    except regex.error as error:
        raise InputError(
            f"data.deidentify.medical_record_pattern {settings.medical_record_pattern!r}: not a regular expression "
            f"({error})"
        ) from None
    dates = [Pattern("in words", pattern, 0.6) for pattern in _DATES_IN_WORDS]
    urls = [Pattern("address", pattern, 0.6) for pattern in _URLS]
    return [
        # Presidio's own checks the domain against a list that it fetches from the internet, and so lets
        # "ward@hospital.internal" pass.
        PatternRecognizer("EMAIL_ADDRESS", name="e-mail", patterns=known.EmailRecognizer.PATTERNS),
        PatternRecognizer(
            "MEDICAL_RECORD_NUMBER",
            name="medical record number",
            patterns=[Pattern("configured", settings.medical_record_pattern, 0.9)],
        ),
        known.UrlRecognizer(patterns=urls),
        known.DateRecognizer(patterns=[*known.DateRecognizer.PATTERNS, *dates]),
        known.PhoneRecognizer(),
        known.IbanRecognizer(),
        known.CreditCardRecognizer(),
        known.IpRecognizer(),
    ]


def _national(countries: tuple[str, ...]) -> list[Any]:
    """What Presidio knows of these countries: ids of people, and of vehicles, banks and companies beside them."""
    from presidio_analyzer import predefined_recognizers as known

    by_country: dict[str, list[Any]] = {}
    for name in known.__all__:
        recognizer = getattr(known, name)
        by_country.setdefault(getattr(recognizer, "COUNTRY_CODE", None) or "", []).append(recognizer)
    by_country.pop("")
    unknown = sorted(set(countries) - set(by_country))
    if unknown:
        raise InputError(
            f"data.deidentify.countries holds {unknown[0]!r}: Presidio knows {', '.join(sorted(by_country))}"
        )
    return [recognizer(supported_language=_LANGUAGE) for country in countries for recognizer in by_country[country]]


def _person(names: list[str], has_model: bool) -> list[Any]:
    from presidio_analyzer.predefined_recognizers import SpacyRecognizer

    return [
        *([_by_list(names)] if names else []),
        *([SpacyRecognizer(supported_entities=["PERSON"])] if has_model else []),
    ]


def _by_list(names: list[str]) -> Any:
    import regex
    from presidio_analyzer import Pattern, PatternRecognizer, RecognizerResult

    class Names(PatternRecognizer):  # type: ignore[misc]  # Presidio is not typed where it is not installed
        def analyze(self, text: str, *args: Any, **kwargs: Any) -> list[RecognizerResult]:
            folded, places = _fold(text)
            found: list[RecognizerResult] = super().analyze(folded, *args, **kwargs)
            for result in found:
                result.start, result.end = places[result.start][0], places[result.end - 1][1]
            return found

    # With case: otherwise every "will", "may" and "mark" is somebody's name.
    written = dict.fromkeys(_fold(form)[0] for name in names for form in (name, name.upper()))
    listed = Pattern("listed", "|".join(map(_bounded, written)), 1.0)
    return Names("PERSON", name="names", patterns=[listed], global_regex_flags=regex.DOTALL | regex.MULTILINE)


def _bounded(name: str) -> str:
    """A pattern for a name that is no part of a word, where its script has spaces around words at all.

    Korean has, but particles follow a name without one.
    """
    import regex

    pattern = r"\s++".join(map(regex.escape, name.split()))
    edge = rf"(?:{UNSPACED}|\p{{Hangul}})"
    before = "" if regex.match(edge, name) else r"(?<!\w)"
    return before + pattern + (r"(?!\p{M})" if regex.search(rf"{edge}\p{{M}}*$", name) else r"(?!\w)")


def _fold(text: str) -> tuple[str, Sequence[tuple[int, int]]]:
    """A text as a typewriter would have it, decomposed (NFKD), and (start, end) in ``text`` of each character of it."""
    pieces: list[str] = []
    places: list[tuple[int, int]] = []
    for cluster in _CLUSTER.finditer(text):
        piece = unicodedata.normalize("NFKD", cluster[0].translate(_TYPEWRITER))
        pieces.append(piece)
        places += [cluster.span()] * len(piece)
    return "".join(pieces), places
