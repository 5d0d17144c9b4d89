"""The ordinary ``openai`` client against a live gateway."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from fakes import ATTACK, CUSTOMER, MODEL, Bench


@pytest.fixture
def client(live: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live}/v1", api_key=CUSTOMER, max_retries=0) as client:
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
