"""The OpenAPI document, made from the very types that decode requests.

Litestar's own generator describes Litestar's own decoding, which is laxer than ours (see
``docs/adr/0004-gateway.md``), so the document is made here: one line for each operation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec

from fortpoint import __version__
from fortpoint.access.presets import NAME_PATTERN
from fortpoint.audit import prover
from fortpoint.gateway import (
    account_routes,
    audit_routes,
    chat,
    completions,
    embeddings,
    health,
    models,
    moderations,
    presets,
    scoring,
    watch_routes,
    wire,
)

_REF = "#/components/schemas/{name}"

_PATH_SCHEMAS = {
    "model": {"type": "string", "minLength": 1},
    "preset": {"type": "string", "pattern": NAME_PATTERN},
    "request_id": {"type": "string", "pattern": "^[a-z]{3}_[0-9a-f]{24}$"},
}

_ASKS = (400, 401, 403, 404, 413, 415, 429, 500, 502, 503, 504)
_READS = (401, 403, 429, 500, 502, 503, 504)

_MEANING = {
    400: "The request is not valid, asks for what is not served, or the guard refused it "
    "(`content_filter`).",
    401: "No key, or a wrong, revoked or expired one.",
    403: "The key's role may not do this, or not ask this of the model's inside; or its account "
    "is suspended or waits for a review.",
    404: "No such model, preset, key or entry.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "The key has too many requests running, or its account is slowed down.",
    500: "An internal error.",
    502: "The request failed in the engine.",
    503: "Engine, guard, audit log or storage is not available; nothing was answered.",
    504: "The request took too long.",
}


@dataclass(frozen=True)
class _Operation:
    path: str
    method: str
    name: str
    summary: str
    answer: type[msgspec.Struct] | str
    ask: type[msgspec.Struct] | None = None
    errors: tuple[int, ...] = ()
    chunk: type[msgspec.Struct] | None = None
    open: bool = False
    query: type[msgspec.Struct] | None = None


_OPERATIONS: Sequence[_Operation] = (
    _Operation(
        "/v1/chat/completions",
        "post",
        "createChatCompletion",
        "Answer a conversation.",
        chat.ChatCompletion,
        chat.ChatRequest,
        _ASKS,
        chat.ChatChunk,
    ),
    _Operation(
        "/v1/completions",
        "post",
        "createCompletion",
        "Go on from a text.",
        completions.Completion,
        completions.CompletionRequest,
        _ASKS,
        completions.Completion,
    ),
    _Operation(
        "/v1/embeddings",
        "post",
        "createEmbedding",
        "Embed texts: the mean over tokens of the last layer's residual stream.",
        embeddings.EmbeddingList,
        embeddings.EmbeddingsRequest,
        _ASKS,
    ),
    _Operation(
        "/v1/moderations",
        "post",
        "createModeration",
        "Judge texts with the guard's detectors.",
        moderations.ModerationList,
        moderations.ModerationsRequest,
        tuple(status for status in _ASKS if status != 404),
    ),
    _Operation(
        "/v1/models", "get", "listModels", "List the models.", models.ModelList, None, _READS
    ),
    _Operation(
        "/v1/models/{model}",
        "get",
        "retrieveModel",
        "Show one model.",
        models.Model,
        None,
        (*_READS, 404),
    ),
    _Operation(
        "/api/engine",
        "get",
        "showEngine",
        "Show the engine (operators only).",
        models.EngineState,
        None,
        _READS,
    ),
    _Operation(
        "/api/score",
        "post",
        "score",
        "The log-likelihood of a text after a prompt (operators only; the guard does not judge).",
        scoring.Score,
        scoring.ScoreRequest,
        _ASKS,
    ),
    _Operation(
        "/api/presets",
        "get",
        "listPresets",
        "List saved steering and whose keys have it (operators only).",
        presets.PresetList,
        None,
        _READS,
    ),
    _Operation(
        "/api/presets",
        "post",
        "savePreset",
        "Save steering under a name, and say whose keys have it (operators only).",
        presets.PresetSaved,
        presets.SavePreset,
        _ASKS,
    ),
    _Operation(
        "/api/presets/{preset}",
        "delete",
        "removePreset",
        "Forget a preset that no key's requests rely on (operators only).",
        presets.PresetRemoved,
        None,
        (*_READS, 400, 404),
    ),
    _Operation(
        "/api/alerts",
        "get",
        "listAlerts",
        "List where watched features were over their thresholds, newest first (operators only).",
        watch_routes.AlertList,
        None,
        (*_READS, 400),
        query=watch_routes.AlertsQuery,
    ),
    _Operation(
        "/api/features/stats",
        "get",
        "listFeatureStatistics",
        "What each key's requests made of what is watched (operators only).",
        watch_routes.StatisticsList,
        None,
        (*_READS, 400),
        query=watch_routes.StatisticsQuery,
    ),
    _Operation(
        "/api/audit/checkpoint",
        "get",
        "showCheckpoint",
        "The record's newest signed checkpoint, in the form of C2SP's tlog-checkpoint.",
        "text/plain",
        None,
        (*_READS, 400, 404),
        query=audit_routes.CheckpointQuery,
    ),
    _Operation(
        "/api/audit/proof/inclusion",
        "get",
        "proveInclusion",
        "Prove that an entry is in the record (RFC 9162).",
        prover.Inclusion,
        None,
        (*_READS, 400, 404),
        query=audit_routes.InclusionQuery,
    ),
    _Operation(
        "/api/audit/proof/consistency",
        "get",
        "proveConsistency",
        "Prove that the record continues an earlier state of it (RFC 9162).",
        prover.Consistency,
        None,
        (*_READS, 400, 404),
        query=audit_routes.ConsistencyQuery,
    ),
    _Operation(
        "/api/audit/cosignature",
        "post",
        "addCosignature",
        "Keep a witness's cosignature of a checkpoint.",
        audit_routes.Cosigned,
        audit_routes.CosignedCheckpoint,
        _ASKS,
    ),
    _Operation(
        "/api/audit/requests/{request_id}",
        "get",
        "proveRequest",
        "One's own request as the record has it, with its proof.",
        audit_routes.EntryProof,
        None,
        (*_READS, 400, 404),
        query=audit_routes.CheckpointQuery,
    ),
    _Operation(
        "/api/audit/entries",
        "get",
        "listEntries",
        "The record's entries in order (auditors and operators only).",
        audit_routes.EntryList,
        None,
        (*_READS, 400, 404),
        query=audit_routes.EntriesQuery,
    ),
    _Operation(
        "/api/accounts",
        "get",
        "listAccounts",
        "List accounts that have a risk or a consequence, the last changed first (operators only).",
        account_routes.AccountList,
        None,
        (*_READS, 400, 404),
        query=account_routes.AccountsQuery,
    ),
    _Operation(
        "/api/accounts/evidence",
        "get",
        "showAccount",
        "Show an account with its evidence and its links (operators only).",
        account_routes.AccountShown,
        None,
        (*_READS, 400, 404),
        query=account_routes.EvidenceQuery,
    ),
    _Operation(
        "/api/accounts/decisions",
        "post",
        "decideAccount",
        "Suspend an account, or end what was done to it (operators only).",
        account_routes.AccountDecided,
        account_routes.DecideAccount,
        _ASKS,
    ),
    _Operation("/health/live", "get", "live", "This process answers.", health.Health, open=True),
    _Operation(
        "/health/ready", "get", "ready", "The engine answers too.", health.Health, open=True
    ),
    _Operation("/metrics", "get", "metrics", "Metrics.", "text/plain", open=True),
    _Operation("/", "get", "page", "What is running.", "text/html", open=True),
)


@cache
def document() -> bytes:
    """The OpenAPI 3.1 document as JSON."""
    return wire.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "Fort Point",
                "version": __version__,
                "description": "OpenAI's API over a guarded model. Requests and answers carry "
                "our own part under `fortpoint`. Fields that are not listed are ignored.",
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "security": [{"key": []}],
            "paths": _paths(),
            "components": {
                "schemas": _schemas(),
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
        }
    )


def _paths() -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for operation in _OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    return paths


def _described(operation: _Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": _responses(operation),
    }
    if operation.open:
        described["security"] = []
    if operation.ask is not None:
        content = {"application/json": {"schema": _ref(operation.ask)}}
        described["requestBody"] = {"required": True, "content": content}
    if parameters := [*_in_path(operation.path), *_in_query(operation.query)]:
        described["parameters"] = parameters
    return described


def _in_path(path: str) -> Iterator[dict[str, Any]]:
    for name, schema in _PATH_SCHEMAS.items():
        if f"{{{name}}}" in path:
            yield {"name": name, "in": "path", "required": True, "schema": schema}


def _in_query(kind: type[msgspec.Struct] | None) -> Iterator[dict[str, Any]]:
    if kind is None:
        return
    _, schemas = msgspec.json.schema_components([kind], ref_template=_REF)
    described = schemas[kind.__name__]
    for name, schema in described["properties"].items():
        required = name in described.get("required", ())
        yield {"name": name, "in": "query", "required": required, "schema": schema}


def _responses(operation: _Operation) -> dict[str, Any]:
    if isinstance(operation.answer, str):
        content: dict[str, Any] = {operation.answer: {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": _ref(operation.answer)}}
    if operation.chunk is not None:
        what = f"Events of `{operation.chunk.__name__}`, then `data: [DONE]`."
        content["text/event-stream"] = {"schema": {"type": "string", "description": what}}
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    for status in operation.errors:
        responses[str(status)] = {
            "description": _MEANING[status],
            "content": {"application/json": {"schema": _ref(wire.ErrorBody)}},
        }
    if operation.path == "/health/ready":
        responses["503"] = {"description": "There is no engine to ask.", "content": content}
    return responses


def _schemas() -> dict[str, Any]:
    kinds: set[type[msgspec.Struct]] = {wire.ErrorBody}
    for operation in _OPERATIONS:
        for kind in (operation.answer, operation.ask, operation.chunk):
            if kind is not None and not isinstance(kind, str):
                kinds.add(kind)
    ordered = sorted(kinds, key=lambda kind: kind.__name__)
    _, schemas = msgspec.json.schema_components(ordered, ref_template=_REF)
    for schema in schemas.values():
        if "description" in schema:
            schema["description"] = " ".join(schema["description"].split())
    schemas["ScoreRequest"]["oneOf"] = [{"required": ["messages"]}, {"required": ["prompt"]}]
    return dict(schemas)


def _ref(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _REF.format(name=kind.__name__)}
