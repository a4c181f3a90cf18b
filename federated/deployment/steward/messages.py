"""What a silo's logs tell its steward of its messages: what came, what was answered, what was refused and why."""

import json
import re
from collections.abc import Iterator
from typing import Any

from configs.events import is_number
from configs.storage.layout import SiloFiles
from federated.deployment.steward.entries import Coordinators, at
from federated.silo.line_file import LineFile

SHOWN = 20
_READ_BYTES = 4 * 2**20  # of each log, its newest: whoever keeps a page open has it read again and again
_REFUSAL = re.compile(r"\S+ \S+ WARNING refused (.*)")
_Line = dict[str, Any]


def refusal_lines(files: SiloFiles) -> list[str]:
    """The newest refusals as ``silo.log`` has them; an indented line goes on with another message, and is none."""
    return [line for line in LineFile(files.log).newest(_READ_BYTES) if _REFUSAL.match(line)][-SHOWN:]


def replies(files: SiloFiles, coordinators: Coordinators) -> list[_Line]:
    """The replies to requests that were accepted, oldest first, each with what asked for it."""
    asked: dict[str, _Line] = {}
    found = []
    for line in _lines(LineFile(files.traffic)):
        digest = str(line.get("request_digest", ""))
        if line.get("direction") == "accepted":
            asked[digest] = line
        elif line.get("direction") == "out":
            request = asked.get(digest, {})
            whose = {name: str(request.get(name, "")) for name in ("run", "kind", "study")}
            coordinator = coordinators.shown(str(request.get("coordinator", "")))
            found.append({**_reply(line), **whose, "coordinator": coordinator, "request_digest": digest})
    return found


def with_reasons(refused: list[_Line], files: SiloFiles) -> list[_Line]:
    """Replies that refuse, each with what ``silo.log`` says of it."""
    said = [match[1].partition(": ") for line in refusal_lines(files) if (match := _REFUSAL.match(line))]
    reasons = {digest: reason for digest, _, reason in said}
    return [{**line, "reason": reasons.get(line["request_digest"], line["outcome"])} for line in refused]


def turned_away(files: SiloFiles) -> list[_Line]:
    """The newest replies to what no trusted coordinator may ask: unsigned, expired, or one too many in a day."""
    return [_reply(line) for line in _lines(LineFile(files.strangers)) if line.get("direction") == "out"][-SHOWN:]


def _reply(line: _Line) -> _Line:
    outcome, digest = str(line.get("outcome", "")), str(line.get("digest", ""))
    return {"time": at(line["time"]), "outcome": outcome, "bytes": line["bytes"], "digest": digest}


def _lines(file: LineFile) -> Iterator[_Line]:
    """What can be read of the newest lines: a kill may have cut one short."""
    for text in file.newest(_READ_BYTES):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and all(is_number(line.get(name)) for name in ("time", "bytes")):
            yield line
