"""The gateway: every route, and the whole path of a request as one list.

    app = create_app(services)        # an ASGI application

Around all of this stands the edge (``edge.py``): it records what ends here without an entry,
stops what nobody waits for any more, and writes every error in OpenAI's form.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from litestar import Litestar, Request, Response, get, post
from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp

from fortpoint.config import Config
from fortpoint.engine.protocol import Generate, Sampling
from fortpoint.gateway import (
    account_routes,
    audit_routes,
    chat,
    completions,
    embeddings,
    faults,
    generation,
    health,
    judgement,
    metrics,
    models,
    moderations,
    openapi,
    page,
    preset_routes,
    presets,
    record,
    scoring,
    steps,
    watch_routes,
    white_box,
)
from fortpoint.gateway.edge import Edge
from fortpoint.gateway.exchange import Exchange
from fortpoint.gateway.generation import Answered, Header, Prompt
from fortpoint.gateway.sampling import TextRequest
from fortpoint.gateway.services import Services
from fortpoint.gateway.stream import EventStream, Format, Next, with_features
from fortpoint.types import Message, Role

_A = TypeVar("_A", bound=TextRequest)
_R = TypeVar("_R")


@dataclass(frozen=True)
class _Surface(Generic[_A]):
    """One way to ask for text."""

    parse: Callable[[bytes, Config], _A]
    prompts: Callable[[_A], tuple[Prompt, ...]]
    sampling: Callable[[_A, Config], Sampling]
    form: Callable[[Header], Format]
    prefix: str


_CHAT = _Surface(
    chat.parse, chat.prompts, chat.sampling_of, chat.ChatFormat, chat.ChatFormat.prefix
)
_COMPLETIONS = _Surface(
    completions.parse,
    completions.prompts,
    completions.sampling_of,
    completions.CompletionFormat,
    completions.CompletionFormat.prefix,
)


async def generate(request: Request[Any, Any, Any], surface: _Surface[_A]) -> ASGIApp:
    """The path of a request that asks for text."""
    exchange = Exchange.of(request.scope)
    services = exchange.services
    # 1. Access: who asks, before a byte of the body is read; one of its places.
    principal = await steps.admit(request, exchange)
    # 2. Parse, limits first; the model must be the one that is served, and what is asked of
    #    its inside must be allowed to this key and loaded. So must what its operator saved.
    ask = surface.parse(await steps.body(request, exchange), services.config)
    prompts = surface.prompts(ask)
    sampling = surface.sampling(ask, services.config)
    exchange.asks_logprobs = sampling.logprobs is not None
    inside = ask.fortpoint or white_box.NOTHING
    white_box.check_allowed(inside, principal, services.config.extraction)
    exchange.model = await services.catalogue.require(ask.model)
    white_box.check_names(inside, exchange.model)
    applied = await presets.applied(services.presets, principal, inside.preset, exchange.model)
    exchange.inside = presets.recorded(inside, applied)
    wanted = white_box.wanted(inside, Generate("", sampling, tenant=principal.key_id))
    wanted = presets.steered(applied, wanted)
    # 3. The engine prefills and its probes read; the guard reads text and probes, and decides
    #    before the first token. A refusal leaves here, by ContentBlocked.
    form = surface.form(Header.of(exchange, surface.prefix, exchange.model.model, wanted))
    opens = [
        partial(generation.open_judged, exchange, prompt, wanted, number)
        for number, prompt in enumerate(prompts)
    ]
    if ask.stream:
        if len(prompts) > 1:
            await _gather(
                [generation.prejudge(exchange, one, number) for number, one in enumerate(prompts)]
            )
        # 4. The engine decodes; the guard reads text and probes again, and tokens leave once a
        #    window behind them is clean, the last one after its entry.
        usage = ask.stream_options is not None and bool(ask.stream_options.include_usage)
        return EventStream(exchange, form, await opens[0](), opens[1:], wanted, usage)
    # 4. The engine decodes, and the guard reads along in the same way.
    longest = min(sampling.max_tokens, exchange.model.max_context)
    white_box.check_volume(wanted.watch, longest * sampling.n * len(prompts))
    answers = await _gather([_answer(exchange, one, wanted) for one in opens])
    choices = [choice for answer in answers for choice in answer.choices]
    # 5. Audit: the entry is on disk before a byte of the answer leaves.
    exchange.answers([choice.text for choice in choices])
    await exchange.record(record.answered(exchange))
    # 6. Answer.
    read = [answer.prompt_features for answer in answers] if wanted.watch else None
    note = with_features(exchange.note(), read)
    return steps.json(form.whole(choices, exchange.usage_counts(), note))


async def _answer(exchange: Exchange, opened: Next, wanted: Generate) -> Answered:
    return await generation.collect(exchange, await opened(), wanted)


@post("/v1/chat/completions", status_code=200)
async def chat_completions(request: Request[Any, Any, Any]) -> ASGIApp:
    return await generate(request, _CHAT)


@post("/v1/completions", status_code=200)
async def text_completions(request: Request[Any, Any, Any]) -> ASGIApp:
    return await generate(request, _COMPLETIONS)


@post("/v1/embeddings", status_code=200)
async def embed(request: Request[Any, Any, Any]) -> ASGIApp:
    exchange = Exchange.of(request.scope)
    services = exchange.services
    await steps.admit(request, exchange)
    ask = embeddings.parse(await steps.body(request, exchange), services.config.server)
    exchange.model = await services.catalogue.require(ask.model)
    await judgement.observe(exchange, [(Message(Role.USER, one),) for one in embeddings.texts(ask)])
    embedded = await embeddings.embedded(services.engine, ask)
    exchange.count(prompt=embedded.usage.prompt)
    data = embeddings.written(ask, embedded.vectors)
    exchange.answers(data)
    await exchange.record(record.answered(exchange))
    usage = embeddings.EmbeddingUsage(exchange.usage.prompt, exchange.usage.prompt)
    return steps.json(
        embeddings.EmbeddingList(
            data=data, model=exchange.model.model, usage=usage, fortpoint=exchange.note()
        )
    )


@post("/v1/moderations", status_code=200)
async def moderate(request: Request[Any, Any, Any]) -> ASGIApp:
    exchange = Exchange.of(request.scope)
    services = exchange.services
    await steps.admit(request, exchange)
    ask = moderations.parse(await steps.body(request, exchange), services.config.server)
    exchange.model = await services.catalogue.current()
    results = await _gather(
        [_moderation(exchange, texts) for texts in moderations.conversations(ask)]
    )
    exchange.answers(results)
    await exchange.record(record.answered(exchange))
    answer_id = "modr-" + exchange.request_id.removeprefix("req_")
    return steps.json(
        moderations.ModerationList(answer_id, exchange.model.model, results, exchange.note())
    )


async def _moderation(exchange: Exchange, messages: tuple[Message, ...]) -> moderations.Moderation:
    services = exchange.services
    reading = None
    if services.guard is not None and services.config.guard.probes:
        scanned = await services.engine.scan(messages)
        exchange.count(prompt=scanned.usage.prompt)
        reading = scanned.reading
    return moderations.written(await judgement.require(exchange, messages, reading))


@get("/v1/models")
async def list_models(request: Request[Any, Any, Any]) -> ASGIApp:
    exchange = Exchange.of(request.scope)
    await steps.admit(request, exchange)
    exchange.model = await exchange.services.catalogue.current()
    return steps.json(models.ModelList(data=(models.card(exchange.model),)))


@get("/v1/models/{model:path}")
async def show_model(request: Request[Any, Any, Any]) -> ASGIApp:
    exchange = Exchange.of(request.scope)
    await steps.admit(request, exchange)
    name = str(request.path_params["model"]).lstrip("/")
    exchange.model = await exchange.services.catalogue.require(name)
    return steps.json(models.card(exchange.model))


@get("/api/engine")
async def show_engine(request: Request[Any, Any, Any]) -> ASGIApp:
    exchange = Exchange.of(request.scope)
    steps.require(await steps.admit(request, exchange), "operator")
    exchange.model = await exchange.services.catalogue.fresh()
    return steps.json(models.state(exchange.model))


@post("/api/score", status_code=200)
async def score(request: Request[Any, Any, Any]) -> ASGIApp:
    """An operator's tool: the guard notes what it thinks of what is scored, and refuses nothing."""
    exchange = Exchange.of(request.scope)
    services = exchange.services
    principal = await steps.admit(request, exchange)
    steps.require(principal, "operator")
    ask = scoring.parse(await steps.body(request, exchange), services.config)
    exchange.model = await services.catalogue.require(ask.model)
    white_box.check_names(ask.inside, exchange.model, under="")
    applied = await presets.applied(services.presets, principal, None, exchange.model)
    exchange.inside = presets.recorded(ask.inside, applied)
    await judgement.observe(exchange, [scoring.judged(ask)])
    asked = scoring.request_of(ask, exchange.request_id, principal.key_id)
    asked = presets.steered(applied, asked)
    scored = await scoring.scored(services.engine, asked)
    exchange.count(prompt=scored.usage.prompt, completion=scored.usage.completion)
    exchange.answers([scored.tokens, scored.logprobs])
    await exchange.record(record.answered(exchange))
    return steps.json(scoring.written(scored, exchange.model.model, exchange.note()))


@get("/health/live")
async def live() -> ASGIApp:
    return steps.json(health.Health("live"))


@get("/health/ready")
async def ready(request: Request[Any, Any, Any]) -> ASGIApp:
    state = await health.readiness(Exchange.of(request.scope).services.catalogue)
    return steps.json(state, status=200 if state.status == "ready" else 503)


@get("/metrics")
async def show_metrics(request: Request[Any, Any, Any]) -> ASGIApp:
    text = Exchange.of(request.scope).services.meter.render()
    return ASGIResponse(body=text, headers={"content-type": metrics.CONTENT_TYPE})


@get("/openapi.json")
async def show_openapi() -> ASGIApp:
    return ASGIResponse(body=openapi.document(), media_type="application/json")


@get("/")
async def show_page(request: Request[Any, Any, Any]) -> ASGIApp:
    services = Exchange.of(request.scope).services
    state = await health.readiness(services.catalogue)
    description = await services.catalogue.current() if state.status == "ready" else None
    detectors = services.guard.detectors if services.guard is not None else None
    host, port = request.scope["server"] or ("127.0.0.1", None)
    text = page.render(
        description, detectors, f"http://{host}:{port}" if port else f"http://{host}"
    )
    return ASGIResponse(body=text, headers=page.security_headers(), media_type="text/html")


def create_app(services: Services) -> Litestar:
    """The whole HTTP edge over ``services``."""
    app = Litestar(
        route_handlers=[
            chat_completions,
            text_completions,
            embed,
            moderate,
            list_models,
            show_model,
            show_engine,
            score,
            preset_routes.list_or_save,
            preset_routes.remove,
            watch_routes.list_alerts,
            watch_routes.list_statistics,
            account_routes.list_accounts,
            account_routes.show_account,
            account_routes.decide_account,
            *audit_routes.HANDLERS,
            live,
            ready,
            show_metrics,
            show_openapi,
            show_page,
        ],
        exception_handlers={Exception: _hand_to_edge},
        openapi_config=None,
        logging_config=None,
        debug=False,
    )
    app.asgi_handler = Edge(app.asgi_handler, services)
    return app


async def _gather(waiting: Sequence[Coroutine[Any, Any, _R]]) -> list[_R]:
    """All results, or the first error once the others are stopped."""
    if len(waiting) == 1:
        return [await waiting[0]]
    tasks = [asyncio.create_task(one) for one in waiting]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _hand_to_edge(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Leave the error with the exchange; the edge records it and writes the answer."""
    fault = faults.fault_of(error)
    Exchange.of(request.scope).fault = fault
    headers = getattr(error, "headers", None)
    return Response(b"", status_code=fault.status, headers=headers)
