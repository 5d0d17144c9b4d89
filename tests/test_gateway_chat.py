"""Chat and completions: OpenAI's format in and out, streamed and whole."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import httpx
import msgspec
import pytest

from asking import CHAT, TEXT, chat, events, text
from fakes import DIGEST, MODEL, Bench, in_process
from fortpoint.types import Message, Role


def closed(chunks: list[dict[str, Any]]) -> list[int]:
    """The choices that ended, in order."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return [choice["index"] for choice in choices if choice["finish_reason"]]


async def test_chat_answers_in_openai_form(bench: Bench, client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json=chat())

    answer = response.json()
    assert response.status_code == 200
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Golden Gate Bridge",
        "refusal": None,
    }
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert response.headers["x-request-id"] == answer["fortpoint"]["request_id"]
    assert response.headers["x-fortpoint-guard"] == "jailbreak,injection,harmful_request"


async def test_chat_records_one_entry_with_hashes_and_no_content(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    body = json.dumps(chat("a private question")).encode()
    response = await client.post(CHAT, content=body, headers={"content-type": "application/json"})

    (entry,) = bench.audit.entries
    assert response.json()["fortpoint"]["audit"]["index"] == 0
    assert (entry.kind, entry.status, entry.code) == ("answer", 200, None)
    assert (entry.user, entry.role, entry.key_id) == ("ada", "customer", "customerkey1")
    assert (entry.model, entry.model_digest) == (MODEL, DIGEST)
    (content,) = bench.audit.contents
    assert content is not None
    assert (content.request, content.response) == (None, None)
    assert entry.request_sha256 == hashlib.sha256(content.salt + body).hexdigest()
    answer = content.salt + b'["Golden Gate Bridge"]'
    assert entry.response_sha256 == hashlib.sha256(answer).hexdigest()
    assert entry.verdict is not None
    assert entry.usage.completion == 3
    assert b"private" not in msgspec.json.encode(entry)


async def test_chat_with_content_recording_keeps_both_texts(bench: Bench) -> None:
    bench.config = msgspec.structs.replace(
        bench.config, audit=msgspec.structs.replace(bench.config.audit, record_content=True)
    )
    async with in_process(bench) as client:
        await client.post(CHAT, json=chat("a private question"))

    (content,) = bench.audit.contents
    assert content is not None
    assert b"a private question" in (content.request or b"")
    assert content.response == b'["Golden Gate Bridge"]'
    assert b"a private question" not in msgspec.json.encode(bench.audit.entries)


async def test_chat_stream_sends_tokens_then_the_receipt(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    response = await client.post(CHAT, json=chat(stream=True))

    chunks = events(response)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert said == "Golden Gate Bridge"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["fortpoint"]["audit"]["index"] == 0
    assert all("usage" not in chunk for chunk in chunks)
    (content,) = bench.audit.contents
    assert content is not None
    answer = content.salt + b'["Golden Gate Bridge"]'
    assert bench.audit.entries[0].response_sha256 == hashlib.sha256(answer).hexdigest()


async def test_chat_stream_with_usage_ends_with_a_usage_chunk(
    client: httpx.AsyncClient,
) -> None:
    ask = chat(stream=True, stream_options={"include_usage": True})
    chunks = events(await client.post(CHAT, json=ask))

    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
    }
    assert chunks[-1]["fortpoint"]["audit"] is not None
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


async def test_chat_stream_of_three_closes_each_choice_once(client: httpx.AsyncClient) -> None:
    chunks = events(await client.post(CHAT, json=chat(stream=True, n=3)))

    closed = [
        choice["index"]
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["finish_reason"]
    ]
    assert sorted(closed) == [0, 1, 2]


async def test_chat_with_n_gives_n_choices(client: httpx.AsyncClient) -> None:
    answer = (await client.post(CHAT, json=chat(n=3))).json()

    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 9


async def test_chat_parameters_reach_the_engine(bench: Bench, client: httpx.AsyncClient) -> None:
    ask = chat(
        stop=["\n", "END"], seed=7, temperature=0, top_p=0.5, max_completion_tokens=2, user="u"
    )
    answer = (await client.post(CHAT, json=ask)).json()

    sampling = bench.engine.requests[0].sampling
    assert sampling.stop == ("\n", "END")
    assert (sampling.seed, sampling.temperature, sampling.top_p) == (7, 0, 0.5)
    assert sampling.max_tokens == 2
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_chat_without_max_tokens_takes_the_configured_length(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    await client.post(CHAT, json=chat())

    assert bench.engine.requests[0].sampling.max_tokens == 512


async def test_chat_with_two_lengths_takes_the_smaller(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    await client.post(CHAT, json=chat(max_tokens=9, max_completion_tokens=2))

    assert bench.engine.requests[0].sampling.max_tokens == 2


async def test_chat_developer_and_parts_become_plain_messages(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "ok"},
        {"role": "tool", "content": "42", "tool_call_id": "t1"},
    ]
    await client.post(CHAT, json={"model": MODEL, "messages": messages})

    assert bench.engine.requests[0].messages == (
        Message(Role.SYSTEM, "Be short."),
        Message(Role.USER, "ab"),
        Message(Role.ASSISTANT, "ok"),
        Message(Role.TOOL, "42"),
    )


async def test_chat_with_two_user_turns_judges_both(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    response = await client.post(CHAT, json={"model": MODEL, "messages": messages})

    assert response.status_code == 200
    assert [message.content for message in bench.guard.judged[0]] == ["one", "two"]


async def test_chat_with_neutral_values_of_refused_fields_answers(
    client: httpx.AsyncClient,
) -> None:
    ask = chat(
        tools=[],
        tool_choice="auto",
        logprobs=False,
        top_logprobs=0,
        logit_bias={},
        presence_penalty=0,
        frequency_penalty=0.0,
        response_format={"type": "text"},
        modalities=["text"],
        a_field_that_nobody_knows={"deep": [1, 2]},
        fortpoint={},
    )
    assert (await client.post(CHAT, json=ask)).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("logprobs", True),
        ("logit_bias", {"50256": -100}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
    ],
)
async def test_chat_with_unsupported_field_is_refused_by_name(
    bench: Bench, client: httpx.AsyncClient, field: str, value: object
) -> None:
    response = await client.post(CHAT, json=chat(**{field: value}))

    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["code"], error["param"]) == ("unsupported_parameter", field)
    assert bench.engine.requests == []


async def test_chat_with_logprobs_says_it_is_the_extraction_policy(
    client: httpx.AsyncClient,
) -> None:
    error = (await client.post(CHAT, json=chat(logprobs=True))).json()["error"]

    assert "extraction policy" in error["message"]


async def test_completion_of_two_prompts_keeps_their_order(client: httpx.AsyncClient) -> None:
    answer = (await client.post(TEXT, json=text(["one", "two words"], n=2))).json()

    assert answer["object"] == "text_completion"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 5 + 6


async def test_completion_prompt_is_raw_for_the_engine_and_user_text_for_the_guard(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    await client.post(TEXT, json=text("Once upon"))

    assert bench.engine.requests[0].prompt == "Once upon"
    assert bench.engine.requests[0].messages is None
    assert bench.guard.judged[0] == (Message(Role.USER, "Once upon"),)


async def test_completion_stream_of_two_prompts_ends_with_one_receipt(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    chunks = events(await client.post(TEXT, json=text(["one", "two"], stream=True)))

    closed = [
        choice["index"]
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["finish_reason"]
    ]
    assert closed == [0, 1]
    assert [chunk["fortpoint"]["audit"]["index"] for chunk in chunks if "fortpoint" in chunk] == [0]
    assert len(bench.audit.entries) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logprobs", 0),
        ("logit_bias", {"50256": -100}),
        ("echo", True),
        ("best_of", 2),
        ("suffix", "x"),
    ],
)
async def test_completion_with_unsupported_field_is_refused_by_name(
    client: httpx.AsyncClient, field: str, value: object
) -> None:
    error = (await client.post(TEXT, json=text(**{field: value}))).json()["error"]

    assert (error["code"], error["param"]) == ("unsupported_parameter", field)
