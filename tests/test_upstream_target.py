"""Addresses, keys by reference, and the breaker: what needs no server."""

from __future__ import annotations

from pathlib import Path

import pytest

from fortpoint import supervisor
from fortpoint.config import Config, Engine, Guard, Upstream
from fortpoint.engine.upstream.breaker import Breaker
from fortpoint.engine.upstream.events import EventReader
from fortpoint.engine.upstream.observer import reads_along, runs_a_model
from fortpoint.engine.upstream.target import key_variables, load_targets
from fortpoint.errors import ConfigError, EngineError
from fortpoint.home import Home

KEY = "sk-secret-of-the-upstream"


def _config(**changes: object) -> Upstream:
    settings = {"urls": ("https://models.example/v1",), "model": "m", **changes}
    return Upstream(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("https://models.example/v1/", "models.example", 443),
        ("https://models.example:8443/v1", "models.example", 8443),
        ("http://127.0.0.1:8000/v1", "127.0.0.1", 8000),
        ("http://[::1]/v1", "::1", 80),
        ("http://localhost:9/v1", "localhost", 9),
    ],
)
def test_target_of_an_address_is_its_parts(url: str, host: str, port: int) -> None:
    (target,) = load_targets(_config(urls=(url,)), {})
    assert (target.host, target.port, target.tls) == (host, port, url.startswith("https"))
    assert not target.url.endswith("/")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "models.example",
        "ftp://models.example",
        "https://",
        f"https://user:{KEY}@models.example/v1",
        f"https://models.example/v1?key={KEY}",
        "https://models.example/v1#x",
        "https://models.example:0/v1",
        "https://models.example:99999/v1",
        "https://models.example/ v1",
        "https://[::1/v1",
        "https://models.example/v1\r\nx: y",
        "http://models.example/v1",
        "http://127.0.0.1.models.example/v1",
        "http://localhost.models.example/v1",
        "http://0x7f.1/v1",
    ],
)
def test_target_that_is_unsafe_or_none_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_targets(_config(urls=(url,)), {})
    assert KEY not in str(refused.value)


def test_plain_http_elsewhere_is_taken_where_allowed() -> None:
    config = _config(urls=("http://models.example/v1",), allow_plain_http=True)
    assert not load_targets(config, {})[0].tls


def test_key_is_read_from_variable_and_file_and_hides_itself(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"  {KEY}\n")
    for reference in ("env:NAME", f"file:{file}"):
        (target,) = load_targets(_config(api_keys=(reference,)), {"NAME": KEY})
        assert target.api_key is not None
        assert target.api_key.header() == f"Bearer {KEY}"
        assert KEY not in repr(target)


def test_one_key_serves_all_addresses_and_several_one_each() -> None:
    urls = ("https://a.example/v1", "https://b.example/v1")
    environ = {"A": "a-key", "B": "b-key"}
    for given, headers in [
        (("env:A",), ["Bearer a-key", "Bearer a-key"]),
        (("env:A", "env:B"), ["Bearer a-key", "Bearer b-key"]),
        (("", "env:B"), [None, "Bearer b-key"]),
        ((), [None, None]),
    ]:
        targets = load_targets(_config(urls=urls, api_keys=given), environ)
        assert [t.api_key.header() if t.api_key else None for t in targets] == headers


@pytest.mark.parametrize(
    "reference",
    [KEY, "env:", "env:1X", "env:MISSING", "env:BROKEN", "file:relative", "file:/not/there"],
)
def test_key_reference_that_holds_no_key_is_refused_without_repeating_it(reference: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_targets(_config(api_keys=(reference,)), {"BROKEN": f"{KEY}\r\nx: y"})
    assert KEY not in str(refused.value)


def test_more_keys_than_addresses_are_refused() -> None:
    with pytest.raises(ConfigError, match="one for each"):
        load_targets(_config(api_keys=("env:A", "env:A")), {"A": KEY})


@pytest.mark.parametrize(
    ("kind", "enabled", "probes", "reads", "runs"),
    [
        ("embedded", True, True, False, True),
        ("embedded", False, True, False, True),
        ("upstream", True, True, True, True),
        ("upstream", True, False, False, False),
        ("upstream", False, True, False, False),
    ],
)
def test_observer_runs_where_the_guard_s_probes_need_one(
    kind: str, enabled: bool, probes: bool, reads: bool, runs: bool
) -> None:
    config = Config(engine=Engine(kind=kind), guard=Guard(enabled=enabled, probes=probes))
    assert (reads_along(config), runs_a_model(config)) == (reads, runs)


def test_gateway_alone_gets_the_variables_that_hold_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELS_KEY", KEY)
    monkeypatch.setenv("OTHER_SECRET", "x")
    upstream = _config(api_keys=("env:MODELS_KEY",))
    assert key_variables(upstream) == {"MODELS_KEY"}
    config = Config(home=str(tmp_path), engine=Engine(kind="upstream"), upstream=upstream)
    with supervisor.listen("127.0.0.1", 0) as listener:
        gateway = supervisor.gateway_child(config, Home(tmp_path), listener)
        other = supervisor.gateway_child(Config(upstream=upstream), Home(tmp_path), listener)
    engine = supervisor.engine_child(config, Home(tmp_path), None)
    assert gateway._environment["MODELS_KEY"] == KEY
    assert "OTHER_SECRET" not in gateway._environment
    assert "MODELS_KEY" not in engine._environment | other._environment
    assert KEY not in "".join(gateway._command)


def test_breaker_opens_after_failures_in_a_row_and_tries_one_request_later() -> None:
    now = 0.0
    breaker = Breaker(2, 10.0, lambda: now)
    for state in ("closed", "open"):
        assert breaker.admit()
        breaker.failed()
        assert breaker.state == state
    assert not breaker.admit()
    now = 10.0
    assert breaker.state == "half_open"
    assert [breaker.admit(), breaker.admit()] == [True, False]
    breaker.failed()
    assert breaker.state == "open"
    now = 20.0
    assert breaker.admit()
    breaker.began()
    breaker.succeeded()
    assert (breaker.state, breaker.failures) == ("closed", 0)


def test_breaker_s_pause_outlives_requests_that_were_sent_before_it() -> None:
    breaker = Breaker(5, 10.0, lambda: 0.0)
    assert [breaker.admit(), breaker.admit()] == [True, True]
    breaker.told_to_wait(30.0)
    breaker.began()
    assert breaker.state == "open"


def test_breaker_s_only_trial_that_is_cancelled_frees_the_next() -> None:
    now = 0.0
    breaker = Breaker(1, 1.0, lambda: now)
    breaker.admit()
    breaker.failed()
    now = 2.0
    assert breaker.admit()
    breaker.undecided()
    assert breaker.admit()


def test_events_of_every_shape_are_read_and_others_refused() -> None:
    reader = EventReader(64)
    assert reader.feed(b"data:a\r\nid: 1\r\ndata: b\r\n\r\n: note\n\ndata: c") == [b"a\nb"]
    assert reader.feed(b"\n\n") == [b"c"]
    with pytest.raises(EngineError):
        reader.feed(b"hello: x\n")
    with pytest.raises(EngineError):
        EventReader(64).feed(b"data: " + b"x" * 64)
