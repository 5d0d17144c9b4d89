"""Answers under a JSON Schema: always valid, and no schema costs more than a moment."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLParserLimits
from tokenizers import Tokenizer

import tiny_model
from fortpoint.engine import grammar
from fortpoint.engine.grammar import MAX_SCHEMA_BYTES, GrammarCompiler
from fortpoint.engine.protocol import Sampling
from fortpoint.engine.sampler import Chosen, Row, Sampler, choose
from fortpoint.errors import EngineError, InvalidRequest, ModelError

VOCAB = 259
EOS = tiny_model.EOS
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tiny_model.make(tmp_path_factory.mktemp("models") / "tiny")
    return (folder / "tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def compiler(tokenizer: bytes) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCAB, {EOS})


def _restless(tokenizer: bytes) -> Row:
    """Logits' bias towards the tokens that bring JSON to its end."""
    vocabulary = Tokenizer.from_buffer(tokenizer).get_vocab()
    bias = np.zeros(VOCAB, np.float32)
    for closing in '"]},:':
        bias[vocabulary[closing]] = 6.0
    bias[EOS] = 8.0
    return bias


def _write(
    compiler: GrammarCompiler, tokenizer: bytes, schema: Any, seed: int, steps: int = 600
) -> tuple[str, bool]:
    """What random logits write under ``schema``, and whether it came to an end."""
    source = np.random.default_rng(seed)
    bias, tokens = _restless(tokenizer), []
    sampling = Sampling(steps, temperature=1.0, seed=seed)
    state = Sampler(sampling, 0, (), compiler.compile(json.dumps(schema)).fork())
    for _ in range(steps):
        logits = source.standard_normal((1, VOCAB), np.float32) + bias
        (chosen,) = choose(logits, [state])
        assert isinstance(chosen, Chosen), chosen
        if chosen.token == EOS:
            break
        tokens.append(chosen.token)
    text = Tokenizer.from_buffer(tokenizer).decode(tokens)
    return text, len(tokens) < steps


_leaves = st.sampled_from(
    [
        {"type": "string"},
        {"type": "string", "maxLength": 4},
        {"type": "string", "pattern": "^[a-c]{1,3}$"},
        {"type": "string", "format": "date"},
        {"type": "integer"},
        {"type": "integer", "minimum": -3, "maximum": 12},
        {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["red", "green", 7, None]},
        {"const": {"a": [1, "ü"]}},
    ]
)


def _objects(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(st.sampled_from(["a", "b", "long name", '"ü"']), children)
    return st.builds(
        lambda of, closed: {
            "type": "object",
            "properties": of,
            "required": sorted(of),
            **({"additionalProperties": False} if closed else {}),
        },
        properties,
        st.booleans(),
    )


_schemas = st.recursive(
    _leaves,
    lambda children: st.one_of(
        st.builds(lambda of: {"type": "array", "items": of, "maxItems": 3}, children),
        _objects(children),
        st.builds(lambda a, b: {"anyOf": [a, b]}, children, children),
    ),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=_schemas, seed=st.integers(0, 1000))
def test_random_logits_write_json_of_the_schema(
    compiler: GrammarCompiler, tokenizer: bytes, schema: Any, seed: int
) -> None:
    text, ended = _write(compiler, tokenizer, schema, seed)

    assert ended, text
    jsonschema_rs.validate(schema, json.loads(text))


def test_any_object_is_json(compiler: GrammarCompiler, tokenizer: bytes) -> None:
    for seed in range(10):
        text, ended = _write(compiler, tokenizer, {"type": "object"}, seed, steps=3000)
        assert ended
        assert isinstance(json.loads(text), dict)


def test_end_is_allowed_only_where_the_json_is_complete(
    compiler: GrammarCompiler, tokenizer: bytes
) -> None:
    encode = Tokenizer.from_buffer(tokenizer).encode
    growing = compiler.compile(json.dumps(PERSON))
    for token in encode('{"name":"A","age":3').ids:
        assert EOS not in _allowed(growing)
        growing.accept(token)
    assert EOS not in _allowed(growing)
    assert not growing.done
    growing.accept(encode("}").ids[0])

    assert growing.done
    assert _allowed(growing) == [EOS]


def test_forks_go_their_own_ways(compiler: GrammarCompiler, tokenizer: bytes) -> None:
    encode = Tokenizer.from_buffer(tokenizer).encode
    compiled = compiler.compile('{"enum": ["ab", "cd"]}')
    one, other = compiled.fork(), compiled.fork()
    for growing, text in ((one, '"a'), (other, '"c')):
        for token in encode(text).ids:
            growing.accept(token)

    assert _allowed(one) == encode("b").ids
    assert _allowed(other) == encode("d").ids


def test_white_space_does_not_go_on_for_ever(compiler: GrammarCompiler, tokenizer: bytes) -> None:
    encode = Tokenizer.from_buffer(tokenizer).encode
    (space,) = encode(" ").ids
    growing = compiler.compile('{"type": "object"}')
    growing.accept(encode("{").ids[0])
    n_spaces = 0
    while space in _allowed(growing):
        growing.accept(space)
        n_spaces += 1

    assert 0 < n_spaces <= 20


def test_token_that_may_not_come_is_an_error(compiler: GrammarCompiler) -> None:
    growing = compiler.compile('{"type": "boolean"}')
    with pytest.raises(EngineError):
        growing.accept(EOS)
    with pytest.raises(EngineError):
        growing.mask(np.zeros(VOCAB, dtype=np.float32))


def test_state_beyond_its_limits_fails_its_own_row(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "_LIMITS", LLParserLimits(max_lexer_states=30))
    pattern = compiler.compile('{"type": "string", "pattern": "^(.*[a-m].{12}[n-z].{12})*$"}')
    states = [Sampler(Sampling(99, seed=1), 0, (), pattern.fork()), Sampler(Sampling(99), 0, ())]
    for _ in range(200):
        first, second = choose(np.zeros((2, VOCAB), np.float32), states)
        assert isinstance(second, Chosen)
        if not isinstance(first, Chosen):
            break

    assert isinstance(first, EngineError)
    assert "too complex" in first.message


_REFUSED: dict[str, tuple[str, str]] = {
    "not json": ("{", "not valid JSON"),
    "surrogate": ('{"enum": ["\\ud800"]}', "not valid JSON"),
    "list": ("[]", "not a JSON object"),
    "boolean": ("true", "not a JSON object"),
    "unknown type": ('{"type": "wizard"}', "wizard"),
    "unknown keyword": ('{"not": {"type": "string"}}', "not"),
    "too large": ('{"enum": ["' + "x" * MAX_SCHEMA_BYTES + '"]}', "larger than"),
    "too deep": ('{"items":' * 100 + "{}" + "}" * 100, "nested deeper"),
    "far too deep": ("[" * 60_000, "not valid JSON"),
    "long constant": ('{"const": "' + "x" * 5000 + '"}', "longer than"),
    "divisor": ('{"type": "integer", "multipleOf": 999983}', "multipleOf"),
    "parser options": ('{"type": "object", "x-guidance": {}}', "x-guidance"),
    "file": ('{"$ref": "file:///etc/passwd"}', "cannot be followed"),
    "endless": ('{"$ref": "#"}', "cannot be followed"),
    "nothing fits": ('{"type": "object", "properties": {"a": false}, "required": ["a"]}', "'a'"),
    "look-ahead": ('{"type": "string", "pattern": "(?=a)"}', "look-ahead"),
    "huge number": ('{"type": "integer", "maximum": 1' + "0" * 400 + "}", "cannot be followed"),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_schema_that_cannot_be_followed_is_refused(compiler: GrammarCompiler, name: str) -> None:
    schema, why = _REFUSED[name]
    with pytest.raises(InvalidRequest) as raised:
        compiler.compile(schema)

    assert why in raised.value.message
    assert len(raised.value.message) < 300
    assert "\n" not in raised.value.message


_HOSTILE: dict[str, Any] = {
    "nested repetition": {"type": "string", "pattern": "^(([a-z]{1,1000}){1,1000}){1,1000}$"},
    "ambiguous repetition": {"type": "string", "pattern": "^((a+)+)+$"},
    "exponential automaton": {"type": "string", "pattern": "^.*a.{30}$"},
    "many intersections": {"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdef"]},
    "many alternatives": {
        "anyOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(99)]
    },
    "huge enum": {"enum": ["x" * 10 + str(i) for i in range(3500)]},
    "many properties": {"type": "object", "properties": {f"p{i}": {} for i in range(3000)}},
    "large counts": {"type": "array", "items": {}, "minItems": 10**5, "maxItems": 10**6},
    "product of choices": {
        "allOf": [
            {"anyOf": [{"type": "object", "properties": {f"{i}{j}": {}}} for j in range(4)]}
            for i in range(8)
        ]
    },
    "doubling references": {
        "$defs": {
            **{f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(30)},
            "a30": {"type": "string"},
        },
        "$ref": "#/$defs/a0",
    },
}


@pytest.mark.parametrize("name", _HOSTILE)
def test_hostile_schema_costs_little_time(
    compiler: GrammarCompiler, tokenizer: bytes, name: str
) -> None:
    """A bound far above what it takes, and far below what hurts: minutes are what it prevents."""
    started = time.process_time()
    # Refused, or the answer ends with its own error.
    with contextlib.suppress(InvalidRequest, AssertionError):
        _write(compiler, tokenizer, _HOSTILE[name], seed=3, steps=100)
    assert time.process_time() - started < 3.0


def test_tokenizer_that_is_no_json_is_refused_and_not_looked_up() -> None:
    with pytest.raises(ModelError):
        GrammarCompiler(b"someone/some-model", VOCAB, {EOS})
    with pytest.raises(ModelError):
        GrammarCompiler(b"{}", VOCAB, {EOS})


def test_compiling_works_in_the_engines_sandbox(tokenizer: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer)
    script = """
        import os, sys
        from pathlib import Path
        from fortpoint import hardening
        place = Path(sys.argv[1])
        hardening.harden_process(parent_pid=os.getppid())
        hardening.confine_files(
            read=[*hardening.python_paths(), *hardening.runtime_paths(), place]
        )
        hardening.forbid_syscalls(hardening.ENGINE)
        import numpy as np
        from fortpoint.engine.grammar import GrammarCompiler
        compiler = GrammarCompiler((place / "tokenizer.json").read_bytes(), 259, {258})
        row = np.zeros(259, dtype=np.float32)
        compiler.compile('{"type": "object"}').mask(row)
        print(int(np.isfinite(row).sum()))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.stdout, done.stderr) == ("1\n", "")


def _allowed(growing: grammar.Grammar) -> list[int]:
    row = np.zeros(VOCAB, dtype=np.float32)
    growing.mask(row)
    found: list[int] = np.flatnonzero(np.isfinite(row)).tolist()
    return found
