"""The log over HTTP: checkpoints and proofs for any key, its own entries for a customer's.

    GET  /api/audit/checkpoint              the newest signed checkpoint, as C2SP text
    GET  /api/audit/proof/inclusion         ?leaf=17&size=1000
    GET  /api/audit/proof/consistency       ?from=1000&to=2000
    POST /api/audit/cosignature             a checkpoint with a witness's line under it
    GET  /api/audit/requests/{request_id}   one's own entry, its proof and what was kept beside it
    GET  /api/audit/entries                 the entries themselves (auditors and operators)

The first four show hashes and sizes only. They get no entry of their own: a log that grew
whenever a witness looked would never be at rest. Refused ones do.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, get, post
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp
from msgspec import Meta

from fortpoint.access.keys import Principal
from fortpoint.audit.checkpoint import MAX_NOTE_BYTES
from fortpoint.audit.entry import Content, unseal
from fortpoint.audit.prover import Consistency, Inclusion, Leaf, Proven, Prover
from fortpoint.errors import AuditUnavailable, Forbidden, NotFound, VerificationError
from fortpoint.gateway import paging, record, steps, wire
from fortpoint.gateway.exchange import Exchange

MAX_ENTRIES = 1000
MAX_NUMBER = 2**53
MAX_WITNESSES = 16
_READERS = frozenset({"auditor", "operator"})

Number = Annotated[int, Meta(ge=0, le=MAX_NUMBER)]
Witnesses = Annotated[
    int, Meta(ge=0, le=MAX_WITNESSES, description="Cosigned by so many witnesses.")
]


class CheckpointQuery(msgspec.Struct, frozen=True):
    witnesses: Witnesses = 0


class InclusionQuery(msgspec.Struct, frozen=True):
    leaf: Annotated[Number, Meta(description="The entry's index.")] = 0
    size: Annotated[Number, Meta(description="Of the tree; 0 for all entries.")] = 0


class ConsistencyQuery(msgspec.Struct, frozen=True):
    old: Annotated[Number, Meta(description="Size of the earlier tree.")] = msgspec.field(
        name="from", default=0
    )
    new: Annotated[Number, Meta(description="Size of the later tree; 0 for all.")] = msgspec.field(
        name="to", default=0
    )


class EntriesQuery(msgspec.Struct, frozen=True):
    start: Annotated[Number, Meta(description="The first entry's index.")] = 0
    limit: Annotated[int, Meta(ge=1, le=MAX_ENTRIES, description="Entries at most.")] = 100


class CosignedCheckpoint(msgspec.Struct, frozen=True):
    """A checkpoint of this log with lines of witnesses under it."""

    note: Annotated[str, Meta(min_length=1, max_length=MAX_NOTE_BYTES)]


class Cosigned(msgspec.Struct, frozen=True):
    """Whose lines were kept."""

    witnesses: tuple[str, ...]


class KeptContent(msgspec.Struct, frozen=True):
    """``salt`` is hexadecimal; texts are there only where the operator keeps content.

    An entry's ``request_sha256`` is SHA-256(salt || request), its ``response_sha256`` likewise.
    """

    salt: str
    request: str | None
    response: str | None


class EntryProof(msgspec.Struct, frozen=True, kw_only=True):
    """What `scripts/verify_audit.py proof` verifies; hashes are hexadecimal.

    ``entry`` is the very text that was hashed. ``content`` is null for others than its own key,
    and once it was erased.
    """

    object: Literal["audit.proof"] = "audit.proof"
    entry: str
    index: int
    leaf_hash: str
    size: int
    path: tuple[str, ...]
    checkpoint: str
    content: KeptContent | None
    fortpoint: wire.Note


class EntryList(msgspec.Struct, frozen=True, kw_only=True):
    """``next`` is the ``start`` of the next page; null on the last."""

    object: Literal["list"] = "list"
    data: tuple[Leaf, ...]
    next: int | None
    fortpoint: wire.Note


@get("/api/audit/checkpoint")
async def show_checkpoint(request: Request[Any, Any, Any]) -> ASGIApp:
    prover, _ = await _open(request)
    ask = paging.query(request, CheckpointQuery)
    note = await prover.checkpoint(ask.witnesses)
    return ASGIResponse(body=note, media_type="text/plain; charset=utf-8")


@get("/api/audit/proof/inclusion")
async def show_inclusion(request: Request[Any, Any, Any]) -> ASGIApp:
    prover, _ = await _open(request)
    ask = paging.query(request, InclusionQuery)
    proof: Inclusion = await _sound(prover.inclusion(ask.leaf, ask.size or None))
    return steps.json(proof)


@get("/api/audit/proof/consistency")
async def show_consistency(request: Request[Any, Any, Any]) -> ASGIApp:
    prover, _ = await _open(request)
    ask = paging.query(request, ConsistencyQuery)
    proof: Consistency = await _sound(prover.consistency(ask.old, ask.new or None))
    return steps.json(proof)


@post("/api/audit/cosignature", status_code=200)
async def add_cosignature(request: Request[Any, Any, Any]) -> ASGIApp:
    prover, exchange = await _open(request)
    ask = wire.decode(await steps.body(request, exchange), CosignedCheckpoint)
    return steps.json(Cosigned(await _sound(prover.add_cosignature(ask.note.encode()))))


@get("/api/audit/requests/{request_id:str}")
async def show_request(request: Request[Any, Any, Any]) -> ASGIApp:
    exchange = Exchange.of(request.scope)
    principal = await steps.admit(request, exchange)
    ask = paging.query(request, CheckpointQuery)
    wanted = str(request.path_params["request_id"])
    exchange.detail = f"entry of {wanted[:40]}"
    proven = await _sound(_prover(exchange).of_request(wanted, ask.witnesses))
    own = _is_own(principal, proven)
    exchange.answers([proven.leaf.leaf_hash])
    await exchange.record(record.answered(exchange))
    return steps.json(_proof(proven, exchange, with_content=own))


@get("/api/audit/entries")
async def list_entries(request: Request[Any, Any, Any]) -> ASGIApp:
    exchange = Exchange.of(request.scope)
    principal = await steps.admit(request, exchange)
    if principal.role not in _READERS:
        raise Forbidden(f"this needs the role auditor or operator; this key has {principal.role}")
    ask = paging.query(request, EntriesQuery)
    exchange.detail = f"entries from {ask.start}, at most {ask.limit}"
    found = await _prover(exchange).entries(ask.start, ask.limit)
    exchange.answers([leaf.leaf_hash for leaf in found])
    await exchange.record(record.answered(exchange))
    following = found[-1].index + 1 if len(found) == ask.limit else None
    return steps.json(EntryList(data=found, next=following, fortpoint=exchange.note()))


HANDLERS = (
    show_checkpoint,
    show_inclusion,
    show_consistency,
    add_cosignature,
    show_request,
    list_entries,
)


async def _open(request: Request[Any, Any, Any]) -> tuple[Prover, Exchange]:
    """Any key may; what it is shown gets no entry."""
    exchange = Exchange.of(request.scope)
    await steps.admit(request, exchange)
    exchange.audited = False
    return _prover(exchange), exchange


def _prover(exchange: Exchange) -> Prover:
    if exchange.services.prover is None:
        raise NotFound("this gateway keeps no log of its own")
    return exchange.services.prover


async def _sound(proving: Any) -> Any:
    """A log that was changed cannot prove anything: that is the operator's to mend."""
    try:
        return await proving
    except VerificationError as error:
        raise AuditUnavailable(error.message) from None


def _is_own(principal: Principal, proven: Proven) -> bool:
    """Raises ``NotFound``: another's request is as one that never was."""
    try:
        owner = unseal(proven.leaf.entry.encode()).entry.key_id
    except ValueError:
        raise AuditUnavailable("the entry cannot be read; run `fortpoint audit verify`") from None
    own = owner == principal.key_id
    if not own and principal.role not in _READERS:
        raise NotFound("the log has no entry of this request")
    return own


def _proof(proven: Proven, exchange: Exchange, *, with_content: bool) -> EntryProof:
    return EntryProof(
        entry=proven.leaf.entry,
        index=proven.leaf.index,
        leaf_hash=proven.leaf.leaf_hash,
        size=proven.size,
        path=proven.path,
        checkpoint=proven.checkpoint,
        content=_kept(proven.content) if with_content else None,
        fortpoint=exchange.note(),
    )


def _kept(content: Content | None) -> KeptContent | None:
    if content is None:
        return None
    return KeptContent(content.salt.hex(), _text(content.request), _text(content.response))


def _text(data: bytes | None) -> str | None:
    """None too for what is not text: whoever sent it has it, and its hash is in the entry."""
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError:
        return None
