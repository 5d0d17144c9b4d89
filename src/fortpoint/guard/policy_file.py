"""Reads a policy file (TOML) and says in which line it is wrong.

    loaded = load_policy(Path("policy.toml"), detectors)      # PolicyError names the line
    loaded.policy, loaded.sha256
    schema()                                                  # its JSON Schema, published

Refused: a file that is too large or no TOML, an unknown key (the nearest known one is named),
a value outside its limits, a detector that there is not, two rules of one id, and two rules
that contradict. They contradict where neither goes before the other, both can match one score,
and one of them could never act as it says: other actions from the same score on, one action
from two scores on, or a graver action that begins below a milder one. A ladder, milder below
and graver above, is what such rules are for.
"""

from __future__ import annotations

import difflib
import hashlib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec

from fortpoint.errors import ConfigError
from fortpoint.guard.calibration import Calibrations
from fortpoint.guard.conversation import DETECTOR as CRESCENDO
from fortpoint.guard.policy import ANY, GRAVITY, SCOPES, Policy, Rule, specificity
from fortpoint.guard.rules.canary import DETECTOR as CANARY
from fortpoint.guard.rules.secrets import DETECTOR as SECRET

ARTEFACTS = Path(__file__).parent / "artefacts"
MAX_FILE_BYTES = 64 * 1024
MAX_LINES = 4000
SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"

_SHOWN_NAME = 64
_Path = tuple[str | int, ...]


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy, the text that it was read from, and the hexadecimal SHA-256 of its bytes."""

    policy: Policy
    sha256: str
    source: str
    text: str

    @property
    def version(self) -> str:
        return self.policy.version


def shipped_policy(secrets: str = "redact") -> LoadedPolicy:
    """What holds where no file is named: every detector blocks from its own threshold on.

    ``secrets`` is what is done about a secret in an answer (``guard.secrets``).
    """
    text = SHIPPED.format(secrets=secrets)
    return read_policy(text.encode(), "the shipped policy")


def known_detectors(artefacts: Path = ARTEFACTS) -> tuple[str, ...]:
    """Every name that a rule may give: the trained detectors', the rules', the crescendo's.

    Raises ``ModelError``. Loads no weights.
    """
    trained = Calibrations.load(artefacts / "calibration.json").detectors
    return tuple(dict.fromkeys((*trained, SECRET, CANARY, CRESCENDO)))


def load_policy(file: Path, detectors: Sequence[str] | None = None) -> LoadedPolicy:
    """Raises ``ConfigError`` with the line of what is wrong."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"the policy {file} cannot be read: {error.strerror}") from None
    return read_policy(data, str(file), detectors)


def read_policy(data: bytes, source: str, detectors: Sequence[str] | None = None) -> LoadedPolicy:
    """The same from bytes; ``source`` is what errors call them."""
    if len(data) > MAX_FILE_BYTES or data.count(b"\n") > MAX_LINES:
        raise ConfigError(
            f"{source}: a policy has at most {MAX_FILE_BYTES} bytes and {MAX_LINES} lines"
        )
    try:
        text = data.decode("utf-8")
        tree = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{source} is not valid TOML: {str(error)[:200]}") from None
    lines = _Lines(text, source)
    try:
        policy = msgspec.convert(tree, Policy)
    except msgspec.ValidationError as error:
        raise lines.error(*_explained(str(error))) from None
    _check_ids(policy.rules, lines)
    if detectors is not None:
        _check_detectors(policy.rules, detectors, lines)
    _check_escalation(policy, lines)
    _check_contradictions(policy.rules, lines)
    return LoadedPolicy(policy, hashlib.sha256(data).hexdigest(), source, text)


def schema() -> dict[str, Any]:
    """The JSON Schema of a policy (as JSON; TOML has the same values)."""
    described = msgspec.json.schema(Policy)
    for part in described["$defs"].values():
        if "description" in part:
            part["description"] = " ".join(part["description"].split())
    whole = {"$schema": SCHEMA_ID, "title": "Fort Point guard policy", **described}
    ordered: dict[str, Any] = _ordered(whole)
    return ordered


def _ordered(part: Any) -> Any:
    """Alternatives in one order, and whole numbers as such: of types that are equal, ``typing``
    gives the one that it met first."""
    if isinstance(part, float) and part.is_integer():
        return int(part)
    if isinstance(part, list):
        return [_ordered(each) for each in part]
    if not isinstance(part, dict):
        return part
    made = {name: _ordered(each) for name, each in part.items()}
    for name in ("enum", "anyOf"):
        if isinstance(made.get(name), list):
            made[name] = sorted(made[name], key=msgspec.json.encode)
    return made


class _Lines:
    """Finds the line where something stands: the first prefix of the file that has it."""

    def __init__(self, text: str, source: str) -> None:
        self._lines = text.splitlines(keepends=True)
        self._source = source

    def error(self, path: _Path, what: str) -> ConfigError:
        return ConfigError(f"{self._source}, line {self.of(path)}: {what}")

    def pair(self, first: int, second: int, what: str) -> ConfigError:
        lines = f"{self.of(('rules', first))} and {self.of(('rules', second))}"
        return ConfigError(f"{self._source}, lines {lines}: {what}")

    def of(self, path: _Path) -> int:
        """Counting from 1. Of what is missing, the line of what should hold it."""
        while path and not self._has(len(self._lines), path):
            path = path[:-1]
        low, high = 0, len(self._lines)
        while high - low > 1:  # a file has it from some line on
            middle = (low + high) // 2
            if self._has(middle, path):
                high = middle
            else:
                low = middle
        return max(1, high)

    def _has(self, n_lines: int, path: _Path) -> bool:
        """Whether it is in so many lines; within a value of several lines, in those before."""
        for length in range(n_lines, -1, -1):
            try:
                tree: Any = tomllib.loads("".join(self._lines[:length]))
            except tomllib.TOMLDecodeError:
                continue
            try:
                for part in path:
                    tree = tree[part]
            except (KeyError, IndexError, TypeError):
                return False
            return True
        return False


def _explained(message: str) -> tuple[_Path, str]:
    """Where msgspec's error is, and what it says in our words."""
    what, _, place = message.partition(" - at `$")
    path = _parsed(place.rstrip("`"))
    unknown = what.removeprefix("Object contains unknown field `")
    if unknown != what:
        name = unknown.rstrip("`")
        near = difflib.get_close_matches(name[:_SHOWN_NAME], _known(path), n=1, cutoff=0.0)
        shown = name[:_SHOWN_NAME]
        return (*path, name), f"unknown key {shown!r}; did you mean {near[0]!r}?"
    where = ".".join(str(part) for part in path if isinstance(part, str))
    return path, f"{where or 'policy'}: {what[:200]}"


def _parsed(place: str) -> _Path:
    """``.rules[2].threshold`` as its parts."""
    parts: list[str | int] = []
    for name in filter(None, place.split(".")):
        key, *numbers = name.split("[")
        parts += [key] if key else []
        parts += [int(number.rstrip("]")) for number in numbers if number.rstrip("]").isdigit()]
    return tuple(parts)


def _known(path: _Path) -> tuple[str, ...]:
    """The keys of the part of the tree at ``path``."""
    kind: type[msgspec.Struct] = Policy
    for part in path:
        if isinstance(part, str):
            hint = get_type_hints(kind)[part]
            kind = next(_structs(hint), kind)
    return kind.__struct_fields__


def _structs(hint: Any) -> Any:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        yield hint
    for inner in get_args(hint):
        yield from _structs(inner)


def _check_ids(rules: Sequence[Rule], lines: _Lines) -> None:
    seen: dict[str, int] = {}
    for number, rule in enumerate(rules):
        if rule.id in seen:
            raise lines.pair(seen[rule.id], number, f"two rules have the id {rule.id!r}")
        seen[rule.id] = number


def _check_detectors(rules: Sequence[Rule], detectors: Sequence[str], lines: _Lines) -> None:
    for number, rule in enumerate(rules):
        if rule.detector != ANY and rule.detector not in detectors:
            near = difflib.get_close_matches(rule.detector, detectors, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            path = ("rules", number, "detector")
            raise lines.error(path, f"there is no detector {rule.detector!r}{hint}")


def _check_escalation(policy: Policy, lines: _Lines) -> None:
    if policy.second_stage is not None:
        return
    for number, rule in enumerate(policy.rules):
        if rule.action == "escalate":
            what = "escalate needs a [second_stage] to ask"
            raise lines.error(("rules", number, "action"), what)


def _check_contradictions(rules: Sequence[Rule], lines: _Lines) -> None:
    for (first, one), (second, other) in combinations(enumerate(rules), 2):
        if one.shadow != other.shadow or one.detector != other.detector:
            continue
        if specificity(one) != specificity(other) or not _overlap(one, other):
            continue
        if (why := _contradiction(one, other)) is not None:
            raise lines.pair(
                first,
                second,
                f"the rules {one.id!r} and {other.id!r} contradict: {why}; narrow the scope of "
                "one of them",
            )


def _overlap(one: Rule, other: Rule) -> bool:
    """Whether some score could match both."""
    for scope in SCOPES:
        first, second = getattr(one, scope), getattr(other, scope)
        if first is not None and second is not None and not set(first) & set(second):
            return False
    return True


def _contradiction(one: Rule, other: Rule) -> str | None:
    if one.action == other.action:
        return None if one.threshold == other.threshold else "one action from two scores on"
    if one.threshold == other.threshold:
        return "two actions from the same score on"
    if isinstance(one.threshold, str) or isinstance(other.threshold, str):
        return None  # which of them is lower depends on the evidence; the graver one stands
    milder, graver = sorted((one, other), key=lambda rule: GRAVITY[rule.action])
    if graver.threshold < milder.threshold:  # type: ignore[operator]
        return f"{graver.action} begins below {milder.action}, which would never act"
    return None


SHIPPED = """\
# What holds where guard.policy names no file.
version = "shipped-1"

[[rules]]
id = "every-detector"
detector = "*"
threshold = "calibrated"
action = "block"

[[rules]]
id = "secrets"
detector = "secret"
threshold = "calibrated"
action = "{secrets}"
directions = ["output"]
"""
