"""The query string of a list, decoded as strictly as a body.

    ask = paging.query(request, AlertsQuery)

A parameter that is not known, is given twice, or is out of range is refused by name.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar, get_type_hints

import msgspec
from litestar import Request

from fortpoint.errors import InvalidRequest

_T = TypeVar("_T", bound=msgspec.Struct)

_WHOLE = re.compile(r"-?[0-9]{1,18}", re.ASCII)


def query(request: Request[Any, Any, Any], kind: type[_T]) -> _T:
    """The parameters as ``kind`` says. Raises ``InvalidRequest``."""
    hints, given = get_type_hints(kind), request.query_params
    known = {field.encode_name: hints[field.name] for field in msgspec.structs.fields(kind)}
    values: dict[str, str | int] = {}
    for name in given:
        if name not in known:
            raise InvalidRequest(f"the query takes {', '.join(sorted(known))} only")
        if len(texts := given.getall(name)) != 1:
            raise InvalidRequest(f"{name} is given twice", param=name)
        whole = known[name] is int and _WHOLE.fullmatch(texts[0])
        values[name] = int(texts[0]) if whole else texts[0]
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        raise InvalidRequest(what[:200], param=where.rstrip("`") or None) from None
