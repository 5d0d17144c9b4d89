"""The tree of errors: what its drawing says is what the classes are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from http import HTTPStatus

import pytest

from fortpoint import errors
from fortpoint.errors import FortPointError

_ROW = re.compile(
    r"^    (?P<indent>[│ ]*)[├└]── (?P<name>\w+) +(?P<status>\d{3}|\(terminal\)) (?P<code>\w+)"
)

# OpenAI's names; clients match on them. Any other 4xx is the request's fault.
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def subclasses(base: type[FortPointError]) -> Iterator[type[FortPointError]]:
    for child in base.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from subclasses(child)


CLASSES = tuple(subclasses(FortPointError))


def drawn() -> dict[str, tuple[str, str, str]]:
    """Class name to the names of its parent, status and code as the docstring draws them."""
    rows: dict[str, tuple[str, str, str]] = {}
    above = ["FortPointError"]
    for line in (errors.__doc__ or "").splitlines():
        if row := _ROW.match(line):
            depth = len(row["indent"]) // 4
            above[depth + 1 :] = [row["name"]]
            rows[row["name"]] = (above[depth], row["status"], row["code"])
    return rows


def test_tree_drawing_equals_the_classes():
    real = {
        error.__name__: (
            error.__base__.__name__,
            "(terminal)" if error.status == 500 else str(error.status),
            error.code,
        )
        for error in CLASSES
    }
    assert drawn() == real


def test_codes_are_unique_and_well_formed():
    codes = [error.code for error in (FortPointError, *CLASSES)]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in codes)


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_error_status_and_type_agree(error):
    assert HTTPStatus(error.status)
    default = "server_error" if error.status >= 500 else "invalid_request_error"
    assert error.type == _TYPES.get(error.status, default)


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_error_str_is_the_public_message(error):
    raised = error("say what to do next", param="messages")
    assert str(raised) == raised.message == "say what to do next"
    assert raised.param == "messages"


def test_failing_parts_are_closed_not_a_client_fault():
    for error in (errors.GuardFailed, errors.AuditUnavailable, errors.EngineError):
        assert error.status >= 500
