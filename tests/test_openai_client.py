"""The ordinary ``openai`` client against a live gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import openai
import pydantic
import pytest

from asking import permit
from fakes import ATTACK, CUSTOMER, DICTIONARY, MODEL, OPERATOR, Bench, serving


@pytest.fixture
def client(live: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live}/v1", api_key=CUSTOMER, max_retries=0) as client:
        yield client


@pytest.fixture
def logprobs_bench(bench: Bench) -> Bench:
    permit(bench, logprobs=True)
    return bench


@contextmanager
def _client_of(bench: Bench) -> Iterator[openai.OpenAI]:
    with (
        serving(bench) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=CUSTOMER, max_retries=0) as client,
    ):
        yield client


def _ask(text: str = "Name a bridge.") -> list[openai.types.chat.ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


def test_client_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "fortpoint"


def test_client_chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=_ask())

    assert answer.choices[0].message.content == "Golden Gate Bridge"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    assert answer.model_extra is not None
    assert answer.model_extra["fortpoint"]["audit"]["index"] == 0


def test_client_chats_with_two_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=_ask(), n=2)

    assert [choice.index for choice in answer.choices] == [0, 1]


def test_client_streams(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=_ask(), stream=True)
    chunks = list(stream)

    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Golden Gate Bridge"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_client_streams_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=_ask(), stream=True, stream_options={"include_usage": True}
    )
    *_, last = stream

    assert last.usage is not None
    assert last.usage.total_tokens == last.usage.prompt_tokens + 3


def test_client_streams_through_its_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=_ask()) as stream:
        final = stream.get_final_completion()

    assert final.choices[0].message.content == "Golden Gate Bridge"


def test_client_completes(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="The", max_tokens=2)
    streamed = client.completions.create(model=MODEL, prompt="The", stream=True)

    assert answer.choices[0].text == "Golden Gate"
    assert answer.choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].text for chunk in streamed) == "Golden Gate Bridge"


def test_client_gets_logprobs(logprobs_bench: Bench) -> None:
    with _client_of(logprobs_bench) as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=_ask(), logprobs=True, top_logprobs=2
        )
        streamed = list(
            client.chat.completions.create(
                model=MODEL, messages=_ask(), logprobs=True, top_logprobs=2, stream=True
            )
        )
        completed = client.completions.create(model=MODEL, prompt="The", logprobs=1)

    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [token.token for token in logprobs.content] == ["Golden", " Gate", " Bridge"]
    assert [len(token.top_logprobs) for token in logprobs.content] == [2, 2, 2]
    told = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs]
    assert [one.content for one in told] == [[token] for token in logprobs.content]
    of_text = completed.choices[0].logprobs
    assert of_text is not None
    assert of_text.text_offset == [0, 6, 11]


def test_client_without_permission_for_logprobs_is_told_why(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="extraction policy") as caught:
        client.chat.completions.create(model=MODEL, messages=_ask(), logprobs=True)

    assert caught.value.param == "logprobs"


class _Bridge(pydantic.BaseModel):
    name: str


def test_client_parses_an_answer_by_schema(bench: Bench, client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=_ask(), response_format=_Bridge)

    assert answer.choices[0].message.parsed == _Bridge(name="Golden Gate")
    schema = json.loads(bench.engine.requests[0].sampling.json_schema or "")
    assert schema["properties"]["name"]["type"] == "string"


def test_client_asks_for_any_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=_ask(), response_format={"type": "json_object"}
    )

    assert json.loads(answer.choices[0].message.content or "") == {"name": "Golden Gate"}


def test_client_looks_inside_with_an_extra_body(bench: Bench, live: str) -> None:
    inside = {
        "steer": [{"mode": "clamp", "target": f"{DICTIONARY}/7", "strength": 3}],
        "watch": {"dictionaries": [DICTIONARY], "top": 2},
    }
    with openai.OpenAI(base_url=f"{live}/v1", api_key=OPERATOR, max_retries=0) as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=_ask(), extra_body={"fortpoint": inside}
        )

    assert bench.engine.requests[0].steer[0].mode == "clamp"
    note = answer.choices[0].model_extra
    assert note is not None
    assert note["fortpoint"]["features"][0] == {
        "token": "Golden",
        "features": {DICTIONARY: [[7, 0.5], [3, 0.25]]},
    }


def test_client_that_is_a_customer_may_not_look_inside(client: openai.OpenAI) -> None:
    inside = {"watch": {"dictionaries": [DICTIONARY]}}
    with pytest.raises(openai.PermissionDeniedError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=_ask(), extra_body={"fortpoint": inside}
        )

    assert caught.value.param == "fortpoint.watch"


def test_client_embeds(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input=["one", "two"])

    assert len(answer.data) == 2
    assert sum(value * value for value in answer.data[0].embedding) == pytest.approx(1, abs=1e-5)


def test_client_moderates(client: openai.OpenAI) -> None:
    clean, flagged = client.moderations.create(input=["hello", ATTACK]).results

    assert (clean.flagged, flagged.flagged) == (False, True)
    assert flagged.categories.model_extra is not None
    assert flagged.categories.model_extra["jailbreak"] is True


@pytest.mark.parametrize("stream", [False, True])
def test_client_sees_why_an_attack_was_refused(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=_ask(ATTACK), stream=stream)

    assert caught.value.code == "content_filter"
    assert "jailbreak" in caught.value.message
    assert caught.value.request_id is not None


def test_client_with_a_wrong_key_is_refused(live: str) -> None:
    with (
        openai.OpenAI(base_url=f"{live}/v1", api_key="sk-fp-wrong") as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.models.list()

    assert caught.value.code == "invalid_api_key"


def test_client_sees_an_engine_that_dies_in_a_stream(bench: Bench, client: openai.OpenAI) -> None:
    bench.engine.script.die_after = 1
    stream = client.chat.completions.create(model=MODEL, messages=_ask(), stream=True)

    with pytest.raises(openai.APIError, match="engine"):
        list(stream)
