"""The "fortpoint" field: who may ask what of the model's inside, and what comes back."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from asking import CHAT, TEXT, chat, events, permit, refused, text
from fakes import ADAPTER, ATTACK, DICTIONARY, DIRECTION, DIVERGES, OPERATOR, Bench, in_process
from fortpoint.engine.protocol import Condition, Steer, Token, Watch
from fortpoint.errors import EngineError
from fortpoint.gateway.token_features import of_prompt, of_token
from fortpoint.types import FeatureReading, Reading, Role, Segment

_STEER = {"mode": "add", "target": f"{DICTIONARY}/1207", "strength": 4}
_WHEN = {"feature": DIRECTION, "above": 0.5}
_WATCH = {"dictionaries": [DICTIONARY], "top": 3}
_READ = {DICTIONARY: [[7, 0.5], [3, 0.25]]}


@pytest.fixture
async def operator(bench: Bench) -> AsyncIterator[httpx.AsyncClient]:
    async with in_process(bench, OPERATOR) as client:
        yield client


def _inside(**fields: object) -> dict[str, Any]:
    return chat(fortpoint=fields)


async def test_white_box_every_field_reaches_the_engine(
    bench: Bench, operator: httpx.AsyncClient
) -> None:
    steers = [{**_STEER, "scope": "answer", "when": _WHEN}, {"mode": "ablate", "target": DIRECTION}]
    ask = _inside(steer=steers, stop_when=[_WHEN], watch=_WATCH, adapter=ADAPTER)
    response = await operator.post(CHAT, json=ask)

    assert response.status_code == 200
    (request,) = bench.engine.requests
    condition = Condition(DIRECTION, 0.5)
    assert request.steer == (
        Steer("add", f"{DICTIONARY}/1207", 4.0, "answer", condition),
        Steer("ablate", DIRECTION),
    )
    assert request.stop_when == (condition,)
    assert request.watch == Watch((DICTIONARY,), 3)
    assert (request.adapter, request.tenant) == (ADAPTER, "operatorkey1")


async def test_watch_gives_each_choices_and_the_prompts_features(
    operator: httpx.AsyncClient,
) -> None:
    answer = (await operator.post(CHAT, json=chat(n=2, fortpoint={"watch": _WATCH}))).json()

    for choice in answer["choices"]:
        assert choice["fortpoint"] == {
            "features": [
                {"token": token, "features": _READ} for token in ("Golden", " Gate", " Bridge")
            ]
        }
    (prompt,) = answer["fortpoint"]["prompt_features"]
    assert [token["role"] for token in prompt] == ["template"] * 4 + ["user"] * 3
    assert prompt[0] == {"role": "template", "message": None, "features": _READ}
    assert prompt[4]["message"] == 0


@pytest.mark.parametrize(("path", "ask"), [(CHAT, chat()), (TEXT, text())])
async def test_watch_of_a_stream_gives_each_chunk_its_own(
    operator: httpx.AsyncClient, path: str, ask: dict[str, Any]
) -> None:
    response = await operator.post(
        path, json={**ask, "stream": True, "fortpoint": {"watch": _WATCH}}
    )

    chunks = events(response)
    notes = [choice.get("fortpoint") for chunk in chunks for choice in chunk["choices"]]
    told = [note["features"] for note in notes if note]
    assert [[one["token"] for one in note] for note in told] == [["Golden"], [" Gate"], [" Bridge"]]
    assert told[0][0]["features"] == _READ
    assert len(chunks[-1]["fortpoint"]["prompt_features"]) == 1


async def test_watch_of_two_prompts_gives_the_features_of_each(
    operator: httpx.AsyncClient,
) -> None:
    ask = text(["one", "two words"], fortpoint={"watch": _WATCH})
    whole = (await operator.post(TEXT, json=ask)).json()
    streamed = events(await operator.post(TEXT, json={**ask, "stream": True}))

    for note in (whole["fortpoint"], streamed[-1]["fortpoint"]):
        assert [len(prompt) for prompt in note["prompt_features"]] == [5, 6]


async def test_watch_of_more_than_we_can_hold_is_refused(
    bench: Bench, operator: httpx.AsyncClient
) -> None:
    watch = {"dictionaries": [DICTIONARY], "top": 256}
    long_answer = chat(n=8, max_tokens=1000, fortpoint={"watch": watch})
    long_prompt = chat("x " * 1100, max_tokens=5, fortpoint={"watch": watch})

    for ask in (long_answer, long_prompt, {**long_prompt, "stream": True}):
        error = refused(await operator.post(CHAT, json=ask), 400, "invalid_request")
        assert error["param"] == "fortpoint.watch.top"
    assert bench.engine.n_tokens == 0
    assert set(bench.engine.cancelled) == {request.id for request in bench.engine.requests}
    streamed = await operator.post(CHAT, json={**long_answer, "stream": True})
    assert streamed.status_code == 200


async def test_answer_that_nobody_watches_has_no_field_for_it(client: httpx.AsyncClient) -> None:
    answer = (await client.post(CHAT, json=chat())).json()
    chunks = events(await client.post(CHAT, json=chat(stream=True)))

    assert "prompt_features" not in answer["fortpoint"]
    assert "fortpoint" not in answer["choices"][0]
    assert all("fortpoint" not in choice for chunk in chunks for choice in chunk["choices"])


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_when_is_a_stop_to_openai_and_its_own_name_to_us(
    bench: Bench, operator: httpx.AsyncClient, stream: bool
) -> None:
    response = await operator.post(CHAT, json={**_inside(stop_when=[_WHEN]), "stream": stream})

    answer = events(response)[-1] if stream else response.json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["fortpoint"] == {"stopped_by": "stop_when"}
    assert bench.audit.entries[0].finish_reasons == ("stop_when",)


@pytest.mark.parametrize(
    ("field", "value"),
    [("watch", _WATCH), ("steer", [_STEER]), ("stop_when", [_WHEN])],
)
async def test_customer_may_not_look_inside_by_default(
    bench: Bench, client: httpx.AsyncClient, field: str, value: object
) -> None:
    for path, ask in ((CHAT, chat), (TEXT, text)):
        response = await client.post(path, json=ask(fortpoint={field: value}))
        assert refused(response, 403, "forbidden")["param"] == f"fortpoint.{field}"

    assert bench.engine.requests == []
    assert [(entry.kind, entry.status) for entry in bench.audit.entries] == [("refusal", 403)] * 2


async def test_customer_may_what_the_operator_allows_and_no_more(bench: Bench) -> None:
    permit(bench, features="all")
    async with in_process(bench) as client:
        watched = await client.post(CHAT, json=_inside(watch=_WATCH))
        steered = await client.post(CHAT, json=_inside(steer=[_STEER]))
    permit(bench, steering="all")
    async with in_process(bench) as client:
        steers = await client.post(CHAT, json=_inside(steer=[_STEER], stop_when=[_WHEN]))
        watches = await client.post(CHAT, json=_inside(watch=_WATCH))

    assert (watched.status_code, steered.status_code) == (200, 403)
    assert (steers.status_code, watches.status_code) == (200, 403)


async def test_customer_may_name_an_adapter(bench: Bench, client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json=_inside(adapter=ADAPTER))

    assert response.status_code == 200
    assert bench.engine.requests[0].adapter == ADAPTER


_NUMBERS = (-1e9, 1e9, 100.5, "4", None, True)
_WRONG: list[tuple[dict[str, object], str]] = [
    *(({"steer": [{**_STEER, "strength": number}]}, "steer[0].strength") for number in _NUMBERS),
    *(({"stop_when": [{**_WHEN, "above": number}]}, "stop_when[0].above") for number in _NUMBERS),
    ({"steer": [{"mode": "melt", "target": DIRECTION}]}, "steer[0].mode"),
    ({"steer": [{**_STEER, "scope": "prompt"}]}, "steer[0].scope"),
    ({"steer": [{"mode": "add"}]}, "steer[0].target"),
    ({"steer": [{**_STEER, "target": ""}]}, "steer[0].target"),
    ({"steer": [{**_STEER, "target": "x" * 5000}]}, "steer[0].target"),
    ({"steer": [_STEER] * 17}, "steer"),
    ({"steer": _STEER}, "steer"),
    ({"stop_when": [_WHEN] * 17}, "stop_when"),
    ({"watch": {}}, "watch.dictionaries"),
    ({"watch": {"dictionaries": []}}, "watch.dictionaries"),
    ({"watch": {"dictionaries": ["a"] * 17}}, "watch.dictionaries"),
    ({"watch": {"dictionaries": ["a", "a"]}}, "watch.dictionaries"),
    ({"watch": {**_WATCH, "top": 0}}, "watch.top"),
    ({"watch": {**_WATCH, "top": 257}}, "watch.top"),
    ({"watch": {"dictionaries": ["a", "b"], "top": 129}}, "watch.top"),
    ({"adapter": 5}, "adapter"),
    ({"adapter": ""}, "adapter"),
]


@pytest.mark.parametrize(("fields", "param"), _WRONG)
async def test_white_box_field_that_is_wrong_is_named(
    bench: Bench, operator: httpx.AsyncClient, fields: dict[str, object], param: str
) -> None:
    response = await operator.post(CHAT, json=_inside(**fields))

    assert refused(response, 400, "invalid_request")["param"] == f"fortpoint.{param}"
    assert len(response.content) < 1000
    assert bench.engine.requests == []
    assert len(bench.audit.entries) == 1


async def test_white_box_name_with_a_nul_is_refused(operator: httpx.AsyncClient) -> None:
    error = refused(
        await operator.post(CHAT, json=_inside(adapter="a\x00b")), 400, "invalid_request"
    )

    assert error["param"] == "fortpoint"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_white_box_strength_that_is_no_number_is_named(
    bench: Bench, operator: httpx.AsyncClient, number: str
) -> None:
    body = json.dumps(_inside(steer=[{**_STEER, "strength": 4}])).replace("4}", number + "}")
    response = await operator.post(CHAT, content=body, headers={"content-type": "application/json"})

    assert (refused(response, 400, "invalid_request")["param"] or "").endswith("strength")
    assert bench.engine.requests == []


@pytest.mark.parametrize(
    ("fields", "param", "near"),
    [
        ({"steering": []}, "fortpoint", "'steer'"),
        ({"steer": [{**_STEER, "strenght": 1}]}, "fortpoint.steer[0]", "'strength'"),
        ({"steer": [{**_STEER, "when": {"featur": 1}}]}, "fortpoint.steer[0].when", "'feature'"),
        ({"watch": {**_WATCH, "dictionary": 1}}, "fortpoint.watch", "'dictionaries'"),
        ({"x` - at `$.adapter": 1}, "fortpoint", "adapter"),
        ({"k" * 100_000: 1}, "fortpoint", ""),
    ],
)
async def test_white_box_unknown_key_is_refused_with_the_nearest_known(
    operator: httpx.AsyncClient, fields: dict[str, object], param: str, near: str
) -> None:
    response = await operator.post(CHAT, json=_inside(**fields))

    error = refused(response, 400, "invalid_request")
    assert error["param"] == param
    assert near in error["message"]
    assert len(response.content) < 500


@pytest.mark.parametrize(
    ("path", "ask"),
    [
        ("/v1/embeddings", {"model": "m", "input": "x"}),
        ("/v1/moderations", {"input": "x"}),
    ],
)
async def test_white_box_is_refused_where_there_is_nothing_to_ask(
    operator: httpx.AsyncClient, path: str, ask: dict[str, object]
) -> None:
    response = await operator.post(path, json={**ask, "fortpoint": {"adapter": ADAPTER}})

    assert refused(response, 400, "invalid_request")["param"] == "fortpoint"


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"adapter": "pirat"}, "adapter", "'pirate'"),
        ({"watch": {"dictionaries": ["l16"]}}, "watch.dictionaries[0]", "'l15'"),
        ({"steer": [{"mode": "add", "target": "golden"}]}, "steer[0].target", "'golden-gate'"),
        ({"steer": [{"mode": "add", "target": "l16/1"}]}, "steer[0].target", "'l15'"),
        ({"steer": [{"mode": "add", "target": "l15/4608"}]}, "steer[0].target", "0 to 4607"),
        ({"steer": [{"mode": "add", "target": "l15/-1"}]}, "steer[0].target", "0 to 4607"),
        ({"steer": [{"mode": "add", "target": "l15/" + "9" * 99}]}, "steer[0].target", "4607"),
        ({"steer": [{"mode": "add", "target": "l15/\u0661"}]}, "steer[0].target", "0 to 4607"),
        ({"steer": [{"mode": "add", "target": "l15/"}]}, "steer[0].target", "0 to 4607"),
        (
            {"steer": [{**_STEER, "when": {"feature": "none", "above": 1}}]},
            "steer[0].when.feature",
            "direction",
        ),
        ({"stop_when": [{"feature": "l15", "above": 1}]}, "stop_when[0].feature", "direction"),
    ],
)
async def test_white_box_name_of_nothing_is_refused_with_the_nearest_known(
    bench: Bench, operator: httpx.AsyncClient, fields: dict[str, object], param: str, says: str
) -> None:
    error = refused(await operator.post(CHAT, json=_inside(**fields)), 400, "invalid_request")

    assert error["param"] == f"fortpoint.{param}"
    assert says in error["message"]
    assert bench.engine.requests == []


async def test_steered_prompt_is_judged_as_it_is_without_steering(
    bench: Bench, operator: httpx.AsyncClient
) -> None:
    response = await operator.post(CHAT, json=_inside(steer=[_STEER]))

    assert response.status_code == 200
    assert len(bench.engine.scanned) == 1
    assert len(bench.guard.judged) == 1
    (request,) = bench.engine.requests
    assert (request.hold, request.read) == (False, False)


async def test_steered_attack_never_reaches_the_engines_generation(
    bench: Bench, operator: httpx.AsyncClient
) -> None:
    for ask in (chat(ATTACK), chat(ATTACK, stream=True)):
        response = await operator.post(CHAT, json={**ask, "fortpoint": {"steer": [_STEER]}})
        refused(response, 400, "content_filter")

    assert bench.engine.requests == []
    assert [entry.code for entry in bench.audit.entries] == ["content_filter"] * 2


async def test_steered_answer_alone_needs_no_second_pass(
    bench: Bench, operator: httpx.AsyncClient
) -> None:
    await operator.post(CHAT, json=_inside(steer=[{**_STEER, "scope": "answer"}]))

    assert bench.engine.scanned == []
    assert (bench.engine.requests[0].hold, bench.engine.requests[0].read) == (True, True)


async def test_steering_that_diverges_is_its_own_error_and_neighbours_go_on(
    bench: Bench, operator: httpx.AsyncClient
) -> None:
    bench.engine.script.token_s = 0.01
    broken = _inside(steer=[{**_STEER, "strength": DIVERGES}])
    failed, sound = await asyncio.gather(
        operator.post(CHAT, json=broken), operator.post(CHAT, json=_inside(steer=[_STEER]))
    )

    refused(failed, 502, "steering_diverged")
    assert "Golden" not in failed.text
    assert sound.json()["choices"][0]["message"]["content"] == "Golden Gate Bridge"
    codes = {(entry.kind, entry.code) for entry in bench.audit.entries}
    assert codes == {("failure", "steering_diverged"), ("answer", None)}


async def test_steering_that_diverges_in_a_stream_ends_it_with_its_own_event(
    bench: Bench, operator: httpx.AsyncClient
) -> None:
    broken = _inside(steer=[{**_STEER, "strength": DIVERGES}])
    response = await operator.post(CHAT, json={**broken, "stream": True})

    *_, last = [line for line in response.text.split("\n\n") if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "steering_diverged"
    (entry,) = bench.audit.entries
    assert (entry.kind, entry.code, entry.usage.completion) == ("failure", "steering_diverged", 1)


def _features(indices: bytes, values: bytes, top: int = 1) -> FeatureReading:
    return FeatureReading(DICTIONARY, top, indices, values)


@pytest.mark.parametrize(
    "part",
    [
        _features(bytes(3), bytes(4)),
        _features(bytes(4), bytes(8)),
        _features(bytes(4), bytes(4), top=2**40),
        _features(bytes(4), bytes(4), top=-1),
    ],
)
async def test_features_that_do_not_fit_their_token_are_an_engine_error(
    part: FeatureReading,
) -> None:
    reading = Reading((), 1, b"", (), (part,))

    with pytest.raises(EngineError):
        of_token(Token("r", 0, "x", reading=reading))
    with pytest.raises(EngineError):
        await of_prompt(Reading((), 1, b"", (Segment(Role.USER, 0, 0, 1),), (part,)))


async def test_features_of_a_long_prompt_are_those_of_a_short_one() -> None:
    n = 5000
    indices, values = struct.pack(f"<{n}i", *range(n)), struct.pack(f"<{n}f", *[0.123456] * n)
    segments = (Segment(Role.TEMPLATE, -1, 0, 1), Segment(Role.USER, 0, 1, n))
    tokens = await of_prompt(Reading((), n, b"", segments, (_features(indices, values),)))

    assert [token.features[DICTIONARY] for token in tokens] == [[(i, 0.1235)] for i in range(n)]
    assert (tokens[0].role, tokens[1].role, tokens[1].message) == ("template", "user", 0)


async def test_features_without_a_segment_for_each_token_are_an_engine_error() -> None:
    with pytest.raises(EngineError):
        await of_prompt(Reading((), 1, b"", (), (_features(bytes(4), bytes(4)),)))


async def test_document_describes_our_field(client: httpx.AsyncClient) -> None:
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]

    assert set(schemas["WhiteBox"]["properties"]) == {
        "steer",
        "preset",
        "stop_when",
        "watch",
        "adapter",
        "top_k",
        "min_p",
        "repetition_penalty",
    }
    assert schemas["WhiteBox"]["additionalProperties"] is False
    for name in ("ChatRequest", "CompletionRequest"):
        assert "WhiteBox" in json.dumps(schemas[name]["properties"]["fortpoint"])
