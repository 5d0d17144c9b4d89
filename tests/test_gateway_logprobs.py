"""Log-probabilities: off by default, and within the policy when they are on."""

from __future__ import annotations

import httpx
import pytest

from asking import CHAT, TEXT, chat, events, permit, refused, text
from fakes import OPERATOR, Bench, in_process
from fortpoint.engine.protocol import Token
from fortpoint.gateway.token_logprobs import of_chat, of_completion


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    permit(bench, logprobs=True)
    return bench


@pytest.mark.parametrize("key", ["sk-fp-customer", OPERATOR])
@pytest.mark.parametrize("ask", [{"logprobs": True}, {"top_logprobs": 2}])
async def test_logprobs_are_off_for_everybody_by_default(key: str, ask: dict[str, object]) -> None:
    bench = Bench()
    async with in_process(bench, key) as client:
        chatted = await client.post(CHAT, json=chat(**ask))
        completed = await client.post(TEXT, json=text(logprobs=0))

    for response in (chatted, completed):
        error = refused(response, 400, "unsupported_parameter")
        assert error["param"] == "logprobs"
        assert "extraction policy" in error["message"]
    assert bench.engine.requests == []


async def test_logprobs_of_a_chat_have_openais_form(client: httpx.AsyncClient) -> None:
    answer = (await client.post(CHAT, json=chat(logprobs=True, top_logprobs=2))).json()

    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    assert [token["token"] for token in logprobs["content"]] == ["Golden", " Gate", " Bridge"]
    assert logprobs["content"][0] == {
        "token": "Golden",
        "logprob": -0.25,
        "bytes": list(b"Golden"),
        "top_logprobs": [
            {"token": " word0", "logprob": -1.0, "bytes": list(b" word0")},
            {"token": " word1", "logprob": -2.0, "bytes": list(b" word1")},
        ],
    }


async def test_logprobs_without_a_number_have_no_alternatives(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    answer = (await client.post(CHAT, json=chat(logprobs=True))).json()

    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert bench.engine.requests[0].sampling.logprobs == 0


async def test_logprobs_turned_off_by_the_request_are_null(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    answer = (await client.post(CHAT, json=chat(logprobs=False, top_logprobs=3))).json()

    assert answer["choices"][0]["logprobs"] is None
    assert bench.engine.requests[0].sampling.logprobs is None


async def test_logprobs_of_a_completion_have_openais_form(client: httpx.AsyncClient) -> None:
    answer = (await client.post(TEXT, json=text(logprobs=1, n=2))).json()

    for choice in answer["choices"]:
        assert choice["logprobs"] == {
            "tokens": ["Golden", " Gate", " Bridge"],
            "token_logprobs": [-0.25, -0.25, -0.25],
            "top_logprobs": [
                {" word0": -1.0, "Golden": -0.25},
                {" word0": -1.0, " Gate": -0.25},
                {" word0": -1.0, " Bridge": -0.25},
            ],
            "text_offset": [0, 6, 11],
        }


async def test_logprobs_of_a_streamed_chat_come_with_each_token(
    client: httpx.AsyncClient,
) -> None:
    ask = chat(logprobs=True, top_logprobs=1, stream=True)
    chunks = events(await client.post(CHAT, json=ask))

    pieces = [chunk["choices"][0] for chunk in chunks]
    tokens = [piece["logprobs"]["content"][0]["token"] for piece in pieces if piece["logprobs"]]
    assert tokens == ["Golden", " Gate", " Bridge"]


async def test_logprobs_of_a_streamed_completion_count_on(client: httpx.AsyncClient) -> None:
    chunks = events(await client.post(TEXT, json=text(logprobs=0, n=2, stream=True)))

    offsets: dict[int, list[int]] = {0: [], 1: []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["logprobs"] is not None:
                offsets[choice["index"]] += choice["logprobs"]["text_offset"]
    assert offsets == {0: [0, 6, 11], 1: [0, 6, 11]}


async def test_logprobs_of_a_token_without_text_are_sent_in_a_stream(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    bench.engine.script.tokens = ("a", "", "b")
    asked = events(await client.post(CHAT, json=chat(logprobs=True, stream=True)))
    plain = events(await client.post(CHAT, json=chat(stream=True)))

    assert len(asked) == len(plain) + 1


@pytest.mark.parametrize(
    ("path", "ask", "param"),
    [
        (CHAT, chat(logprobs=True, top_logprobs=6), "top_logprobs"),
        (CHAT, chat(logprobs=True, top_logprobs=-1), "top_logprobs"),
        (CHAT, chat(logprobs=5), "logprobs"),
        (TEXT, text(logprobs=6), "logprobs"),
        (TEXT, text(logprobs=True), "logprobs"),
        (TEXT, text(logprobs=-1), "logprobs"),
    ],
)
async def test_logprobs_beyond_five_are_refused(
    bench: Bench, client: httpx.AsyncClient, path: str, ask: dict[str, object], param: str
) -> None:
    assert refused(await client.post(path, json=ask), 400, "invalid_request")["param"] == param
    assert bench.engine.requests == []


def test_logprobs_of_an_engine_that_sends_too_much_are_cut_and_rounded() -> None:
    top = ((" a", -0.123456), (" b", float("-inf")), (" c", -3.0))
    token = Token("r", 0, "x", token="x", logprob=-0.001, top=top)

    (chatted,) = of_chat([token], 2).content
    assert (chatted.logprob, str(chatted.logprob)) == (0.0, "0.0")
    assert [(one.token, one.logprob) for one in chatted.top_logprobs] == [
        (" a", -0.12),
        (" b", -9999.0),
    ]
    assert of_completion([token], 1).top_logprobs == [{" a": -0.12, "x": 0.0}]


def test_logprobs_of_part_of_a_character_have_no_bytes() -> None:
    (token,) = of_chat([Token("r", 0, "", token="\ufffd", logprob=-1.0, top=())], 0).content

    assert token.bytes is None


def test_logprobs_that_an_engine_left_out_are_left_out() -> None:
    token = Token("r", 0, "x")

    assert of_chat([token], 1).content == []
    assert of_completion([token], 1).token_logprobs == [None]
