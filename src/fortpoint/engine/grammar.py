"""Answers that satisfy a JSON Schema: which tokens may come next.

    compiler = GrammarCompiler((folder / "tokenizer.json").read_bytes(), vocab_size, eos)
    compiled = compiler.compile('{"type": "object"}')     # in any thread
    grammar = compiled.fork()                             # one for each answer
    grammar.mask(row)                                     # logits [vocab], in place
    grammar.accept(token)

``llguidance`` keeps a parser at the end of the answer and asks it about every token. White
space between the parts of the JSON is limited, so that no answer consists of it. The end
token is allowed only where the JSON is complete, and is the only one once nothing can follow.

A schema comes from outside. Its size and depth are limited here, the parser's work by the
parser's own limits. ``multipleOf`` is refused: the automata for a few divisors together take
minutes and gigabytes. References to other documents are never fetched. Not protected: a
complete answer is not promised, since ``max_tokens`` may end it in the middle.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from typing import Any

import msgspec
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from fortpoint.engine.sampler import Row
from fortpoint.errors import EngineError, InvalidRequest, ModelError

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 64
MAX_STRING_CHARS = 4096  # the parser's time for a token grows with a constant's length

# Milliseconds of work a step, and at most about 10 MB of parser states an answer.
_LIMITS = LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=50_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)
_WHITE_SPACE = r"[ \n]{1,20}"
_REASON_CHARS = 200


class Grammar:
    """What one answer may still become. Belongs to one thread at a time."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def done(self) -> bool:
        """The JSON is complete and nothing but the end may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def fork(self) -> Grammar:
        """A copy that goes its own way from here."""
        return Grammar(self._matcher.deep_copy())

    def mask(self, row: Row) -> None:
        """Set the logits ``[vocab]`` of tokens that may not come next to -inf, in place.

        Raises ``EngineError`` when the schema is too complex to go on with.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(packed, count=len(row), bitorder="little").view(np.bool_)
        np.copyto(row, -np.inf, where=~allowed)

    def accept(self, token: int) -> None:
        """``token`` came next. Raises ``EngineError`` like ``mask``, or if it may not."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EngineError("the schema became too complex to follow; simplify its patterns")


class GrammarCompiler:
    """Compiles schemas for one model. ``vocab_size`` is the number of logits."""

    def __init__(self, tokenizer: bytes, vocab_size: int, eos: Collection[int]) -> None:
        """``tokenizer`` is the content of ``tokenizer.json``. Raises ``ModelError``."""
        self._one_at_a_time = threading.Lock()
        if not tokenizer.lstrip().startswith(b"{"):  # anything else is taken for a name
            raise ModelError("tokenizer.json of the model is not a JSON object")
        try:
            self._tokenizer = LLTokenizer(
                tokenizer.decode(), n_vocab=vocab_size, eos_token=sorted(eos) or None
            )
        except ValueError:
            raise ModelError("tokenizer.json of the model does not fit its vocabulary") from None

    def compile(self, schema: str) -> Grammar:
        """The grammar of ``schema`` (JSON text) before its first token.

        Raises ``InvalidRequest`` for one that is not valid, not supported, or too complex.
        """
        text = _checked(schema)
        with self._one_at_a_time:
            try:
                grammar = LLMatcher.grammar_from_json_schema(
                    text, overrides={"whitespace_pattern": _WHITE_SPACE}
                )
            except ValueError as error:
                raise _refused(str(error)) from None
            matcher = LLMatcher(self._tokenizer, grammar, limits=_LIMITS, log_level=0)
            if not matcher.is_error():
                matcher.compute_bitmask()  # finds schemas that nothing satisfies
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return Grammar(matcher)


def _refused(reason: str) -> InvalidRequest:
    said = " ".join(reason.partition("<")[0].split())[:_REASON_CHARS]
    return InvalidRequest(f"the JSON schema cannot be followed: {said}")


def _checked(schema: str) -> str:
    """The schema as compact JSON, within limits. Raises ``InvalidRequest``."""
    if len(schema) > MAX_SCHEMA_BYTES or len(schema.encode()) > MAX_SCHEMA_BYTES:
        raise InvalidRequest(f"the JSON schema is larger than {MAX_SCHEMA_BYTES} bytes")
    try:
        value = msgspec.json.decode(schema)
        if not isinstance(value, dict):
            raise InvalidRequest("the JSON schema is not a JSON object")
        for key, item in _walk(value):
            _check_item(key, item)
        return msgspec.json.encode(value).decode()
    except (ValueError, OverflowError, RecursionError):  # msgspec.DecodeError is the first
        raise InvalidRequest("the JSON schema is not valid JSON") from None


def _check_item(key: str, item: Any) -> None:
    if isinstance(item, str) and len(item) > MAX_STRING_CHARS:
        raise InvalidRequest(
            f"a string of the JSON schema is longer than {MAX_STRING_CHARS} characters"
        )
    if key == "multipleOf" and isinstance(item, int | float):
        raise InvalidRequest("the JSON schema uses multipleOf, which is not supported")
    if key == "x-guidance":  # would change the parser's own options
        raise InvalidRequest("the JSON schema uses x-guidance, which is not supported")


def _walk(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every value of the schema under its key, level by level; "" in lists."""
    level: list[tuple[str, Any]] = [("", schema)]
    for _ in range(MAX_SCHEMA_DEPTH):
        yield from level
        level = [pair for _, value in level for pair in _children(value)]
        if not level:
            return
    raise InvalidRequest(f"the JSON schema is nested deeper than {MAX_SCHEMA_DEPTH} levels")


def _children(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return [("", item) for item in value] if isinstance(value, list) else []
