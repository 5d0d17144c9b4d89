"""Bad input against the served product: a clear error each time, and nothing lost."""

from __future__ import annotations

import concurrent.futures
import json
import time
from collections import Counter
from typing import Any

import httpx
import psutil
import pytest

from served import Served, run

pytestmark = pytest.mark.model

PATH = "/v1/chat/completions"


def _ask(content: Any = "Hello", **more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": content}
    return {"model": "smollm2-135m", "messages": [message], "max_tokens": 4} | more


def _post(served: Served, body: bytes | str, path: str = PATH) -> httpx.Response:
    headers = {"Authorization": f"Bearer {served.key}", "Content-Type": "application/json"}
    return httpx.post(f"{served.address}{path}", content=body, headers=headers, timeout=120)


BAD: dict[str, tuple[bytes | str, int]] = {
    "no JSON": ("{not json", 400),
    "empty": ("", 400),
    "not an object": ("[]", 400),
    "wrong types": (json.dumps(_ask(max_tokens="many")), 400),
    "unknown model": (json.dumps(_ask(model="gpt-5")), 404),
    "no messages": (json.dumps(_ask(messages=[])), 400),
    "unknown role": (json.dumps(_ask(messages=[{"role": "god", "content": "x"}])), 400),
    "50 MB": (b" " * 50_000_000, 413),
    "a million tokens": (json.dumps(_ask("hi " * 1_000_000)), 400),
    "more than the context": (json.dumps(_ask("hi " * 6_000)), 400),
    "NUL": (json.dumps(_ask("a\0b")), 400),
    "lone surrogate": (json.dumps(_ask("\ud800")), 400),
    "bytes that are no UTF-8": (b'{"model": "\xff"}', 400),
    "deep nesting": ("[" * 100_000, 400),
    "temperature NaN": (json.dumps(_ask(temperature=float("nan"))), 400),
    "too many answers": (json.dumps(_ask(n=10_000)), 400),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_clear_error_in_openai_form(served: Served, name: str) -> None:
    body, status = BAD[name]
    answer = _post(served, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert error["code"]
    assert len(answer.content) < 2000
    for secret in ("Traceback", 'File "', served.key, str(served.home)):
        assert secret not in answer.text


def test_two_user_turns_in_a_row_are_answered(served: Served) -> None:
    turns = [{"role": "user", "content": text} for text in ("Hello.", "What is a bridge?")]
    assert _post(served, json.dumps(_ask(messages=turns))).status_code == 200


def _recorded(served: Served) -> int:
    report = json.loads(run(served.home, "audit", "verify", "--json").stdout)
    entries: int = report["entries"]
    return entries


def test_200_requests_at_once_are_all_answered_and_all_recorded(served: Served) -> None:
    before = _recorded(served)
    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        asks = [pool.submit(_post, served, json.dumps(_ask())) for _ in range(200)]
        answers = [ask.result() for ask in asks]
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) <= {200, 429, 503}, statuses
    assert statuses[200] >= 64
    for answer in answers:
        if answer.status_code != 200:
            assert answer.json()["error"]["code"] in {"rate_limit_exceeded", "engine_busy"}
    assert _recorded(served) - before == 200


def test_full_disk_withholds_the_answer_and_room_brings_it_back(served: Served) -> None:
    gateway = psutil.Process(served.child("gateway").pid)
    _, hard = gateway.rlimit(psutil.RLIMIT_FSIZE)
    gateway.rlimit(psutil.RLIMIT_FSIZE, (0, hard))
    try:
        refused = _post(served, json.dumps(_ask()))
    finally:
        gateway.rlimit(psutil.RLIMIT_FSIZE, (hard, hard))
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "audit_unavailable"
    assert "choices" not in refused.json()
    assert _post(served, json.dumps(_ask())).status_code == 200
    assert run(served.home, "audit", "verify").returncode == 0


def test_client_that_goes_away_stops_its_generation(served: Served) -> None:
    made = run(served.home, "key", "create", "--user", "op", "--role", "operator", "--json")
    operator = {"Authorization": f"Bearer {json.loads(made.stdout)['key']}"}
    body = _ask("Count to one thousand in words.", stream=True, max_tokens=2000)
    headers = {"Authorization": f"Bearer {served.key}"}
    url = f"{served.address}{PATH}"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as answer:
        next(answer.iter_bytes())
    deadline = time.monotonic() + 10
    while httpx.get(f"{served.address}/api/engine", headers=operator).json()["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
