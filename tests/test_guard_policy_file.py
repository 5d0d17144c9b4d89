"""A policy that is wrong is refused with the line that is wrong."""

from __future__ import annotations

import hashlib
import json

import pytest

from fortpoint.errors import ConfigError
from fortpoint.guard.policy_file import (
    MAX_FILE_BYTES,
    load_policy,
    read_policy,
    schema,
    shipped_policy,
)

_HEAD = 'version = "1"\n'
_DETECTORS = ("jailbreak", "injection", "harmful_request")


def _rules(*rules: str) -> bytes:
    return (_HEAD + "".join(f"\n[[rules]]\n{rule}\n" for rule in rules)).encode()


def _refused(data: bytes) -> str:
    with pytest.raises(ConfigError) as refused:
        read_policy(data, "policy.toml", _DETECTORS)
    return refused.value.message


_ONE = 'id = "a"\ndetector = "jailbreak"\naction = "block"'


def test_read_policy_keeps_the_digest_of_its_bytes(tmp_path):
    file = tmp_path / "policy.toml"
    file.write_bytes(_rules(_ONE))
    loaded = load_policy(file, _DETECTORS)
    assert loaded.sha256 == hashlib.sha256(_rules(_ONE)).hexdigest()
    assert loaded.version == "1"


def test_read_policy_unknown_key_names_the_nearest_and_the_line():
    said = _refused(_rules(_ONE, _ONE.replace("action", "actoin").replace('"a"', '"b"')))
    assert "line 11" in said
    assert "unknown key 'actoin'; did you mean 'action'?" in said


def test_read_policy_unknown_key_at_the_top_names_its_line():
    said = _refused(b'version = "1"\n\nshadwo = true\n')
    assert "line 3" in said
    assert "'shadow'" in said


def test_read_policy_unknown_key_of_a_section_names_the_nearest():
    said = _refused(_HEAD.encode() + b"[account]\nslow_at = 3\nhalf_live_s = 3\n")
    assert "line 4" in said
    assert "'half_life_s'" in said


@pytest.mark.parametrize("threshold", ["1.01", "-0.1", "nan", "inf", '"high"', "true"])
def test_read_policy_threshold_outside_is_refused_with_its_line(threshold):
    said = _refused(_rules(_ONE, f'id = "b"\nthreshold = {threshold}\n{_ONE[9:]}'))
    assert "line 10" in said
    assert "threshold" in said


def test_read_policy_key_that_is_missing_names_the_rule():
    said = _refused(_rules(_ONE, 'id = "b"\ndetector = "jailbreak"'))
    assert "line 8" in said
    assert "action" in said


def test_read_policy_unknown_detector_names_the_nearest_and_the_line():
    said = _refused(_rules(_ONE.replace('"jailbreak"', '"jailbraek"')))
    assert "line 5" in said
    assert "'jailbreak'" in said


def _pair(first: str, second: str) -> bytes:
    return _rules(
        f'id = "a"\ndetector = "jailbreak"\n{first}', f'id = "b"\ndetector = "jailbreak"\n{second}'
    )


_CONTRADICTIONS = {
    "other action": ('action = "block"', 'action = "flag"'),
    "other threshold": ("action = 'block'\nthreshold = 0.4", "action = 'block'\nthreshold = 0.5"),
    "graver below milder": (
        "action = 'block'\nthreshold = 0.4",
        "action = 'flag'\nthreshold = 0.5",
    ),
    "overlapping keys": (
        "action = 'block'\nkeys = ['k1', 'k2']",
        "action = 'allow'\nkeys = ['k2', 'k3']",
    ),
    "a key and a user may be one's": (
        "action = 'block'\nkeys = ['k1']",
        "action = 'allow'\nusers = ['ada']",
    ),
}


@pytest.mark.parametrize("name", _CONTRADICTIONS)
def test_read_policy_rules_that_contradict_are_refused_with_both_lines(name):
    first, second = _CONTRADICTIONS[name]
    said = _refused(_pair(first, second))
    assert f"lines 3 and {3 + 4 + first.count(chr(10)) + 1}" in said
    assert "contradict" in said
    assert "'a' and 'b'" in said


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("action = 'flag'\nthreshold = 0.4", "action = 'block'\nthreshold = 0.5"),
        ("action = 'block'\nkeys = ['k1']", "action = 'allow'\nkeys = ['k2']"),
        ("action = 'block'", "action = 'allow'\nkeys = ['k1']"),
        ("action = 'block'\nroles = ['user']", "action = 'flag'\nroles = ['tool']"),
        ("action = 'flag'\nthreshold = 0.4", "action = 'block'"),
        ("action = 'block'", "action = 'flag'\nshadow = true"),
    ],
)
def test_read_policy_rules_that_do_not_meet_or_are_a_ladder_are_taken(first, second):
    assert len(read_policy(_pair(first, second), "p", _DETECTORS).policy.rules) == 2


def test_read_policy_two_rules_of_one_id_are_refused():
    assert "lines 3 and 8: two rules have the id 'a'" in _refused(_rules(_ONE, _ONE))


def test_read_policy_escalation_without_a_second_stage_is_refused():
    assert "second_stage" in _refused(_rules(_ONE.replace("block", "escalate")))


@pytest.mark.parametrize(
    "data",
    [
        b"version = ",
        b"\xff\xfe",
        b"",
        b"version = 3",
        b"a = " + b"[" * 5000,
        b'version = "1"\n' + b"#" * MAX_FILE_BYTES,
        b"\n" * 5000,
        b'version = "1"\nrules = 3',
        b'version = "1"\nrules = [3]',
        b'version = "1"\n"a.b[0]" = 3',
    ],
)
def test_read_policy_that_is_none_is_refused(data):
    assert "policy.toml" in _refused(data)


def test_read_policy_in_tables_of_any_form_names_the_line():
    rules = 'rules = [\n  {id = "a", detector = "jailbreak", action = "blok"},\n]\n'
    assert "line 4" in _refused((_HEAD + rules).encode())  # where the list ends


def test_load_policy_that_is_not_there_says_so(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_policy(tmp_path / "none.toml")


def test_shipped_policy_is_one():
    assert shipped_policy().policy.rules
    assert shipped_policy("flag").sha256 != shipped_policy().sha256


def test_schema_describes_every_key():
    described = schema()
    assert set(described["$defs"]["Policy"]["properties"]) == {
        "version",
        "shadow",
        "rules",
        "second_stage",
        "conversation",
        "account",
    }
    for part in described["$defs"].values():
        assert part["additionalProperties"] is False
        assert all(
            "description" in key or "anyOf" in key or "$ref" in key or "const" in key
            for key in part["properties"].values()
        ), part["title"]
    json.dumps(described)
