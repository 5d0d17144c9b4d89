"""One frozen tree: defaults < file < environment < flags, and nothing unknown passes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from fortpoint.config import Config, keys, load
from fortpoint.errors import ConfigError

ALL_KEYS = tuple(keys())


@pytest.fixture
def toml(tmp_path: Path):
    def write(text: str) -> Path:
        file = tmp_path / "fortpoint.toml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def refusal(**sources) -> str:
    with pytest.raises(ConfigError) as caught:
        load(**({"environ": {}} | sources))
    return caught.value.message


def test_load_without_sources_gives_defaults():
    assert load(environ={}) == Config()


def test_load_each_source_overrides_the_one_before(toml):
    file = toml("[server]\nport = 1\nmax_n = 2\nmax_inputs = 3\n")
    environ = {"FORTPOINT_SERVER__MAX_N": "4", "FORTPOINT_SERVER__MAX_INPUTS": "5"}
    server = load(file, environ, ["server.max_inputs=6"]).server
    assert (server.port, server.max_n, server.max_inputs) == (1, 4, 6)


def test_load_two_flags_for_one_key_last_wins():
    assert load(environ={}, flags=["server.port=1", "server.port=2"]).server.port == 2


def test_load_flag_value_with_equals_sign_is_kept_whole():
    assert load(environ={}, flags=["home=/tmp/a=b"]).home == "/tmp/a=b"


@pytest.mark.parametrize(
    "order", [("PORT", "FORTPOINT_SERVER__PORT"), ("FORTPOINT_SERVER__PORT", "PORT")]
)
def test_environ_short_and_long_name_long_wins(order):
    values = {"PORT": "8081", "FORTPOINT_SERVER__PORT": "8082"}
    assert load(environ={name: values[name] for name in order}).server.port == 8082


def test_list_is_an_array_in_a_file_and_comma_separated_elsewhere(toml):
    urls = ("https://a.example/v1", "https://b.example/v1")
    file = toml(f"[upstream]\nurls = {list(urls)}\n")
    text = ", ".join(urls)
    assert load(file, environ={}).upstream.urls == urls
    assert load(environ={"FORTPOINT_UPSTREAM__URLS": text}).upstream.urls == urls
    assert load(file, environ={}, flags=["upstream.urls="]).upstream.urls == ()
    assert "upstream.urls" in refusal(file=toml('[upstream]\nurls = "https://a.example/v1"\n'))


def test_environ_short_names_set_home_and_port():
    config = load(environ={"FORTPOINT_HOME": "/srv/fort", "PORT": "9000"})
    assert (config.home, config.server.port) == ("/srv/fort", 9000)


def test_environ_empty_short_names_count_as_absent():
    assert load(environ={"FORTPOINT_HOME": "", "PORT": ""}) == Config()


def test_environ_of_other_programs_is_ignored():
    assert load(environ={"SERVER__PORT": "1", "PORTS": "2", "HOME": "/root"}) == Config()


@pytest.mark.parametrize(
    "key", [key for key in ALL_KEYS if not key.type.startswith("table")], ids=lambda key: key.name
)
def test_environ_every_key_can_be_set_by_its_variable(key):
    value = msgspec.json.decode(key.default)
    value = ",".join(value) if isinstance(value, list) else value
    text = key.default if not isinstance(value, str) else value
    assert load(environ={key.variable: text}) == Config()


def test_environ_process_is_the_default_source(monkeypatch):
    monkeypatch.setenv("PORT", "9001")
    assert load().server.port == 9001


def test_unknown_key_in_file_names_file_and_nearest(toml):
    file = toml("[server]\nprot = 1\n")
    assert refusal(file=file) == f"{file}: unknown key 'server.prot'; did you mean 'server.port'?"


def test_unknown_top_level_key_in_file_names_nearest(toml):
    assert "unknown key 'port'; did you mean 'server.port'?" in refusal(file=toml("port = 1\n"))


def test_unknown_key_in_environ_names_variable_and_nearest():
    assert refusal(environ={"FORTPOINT_ENGINE__THREAD": "1"}) == (
        "environment: unknown variable FORTPOINT_ENGINE__THREAD; "
        "did you mean FORTPOINT_ENGINE__THREADS?"
    )


def test_unknown_variable_without_section_is_not_ignored():
    assert "did you mean FORTPOINT_SERVER__PORT?" in refusal(environ={"FORTPOINT_PORT": "1"})


def test_unknown_key_in_flag_names_nearest():
    assert refusal(flags=["guard.enable=1"]) == (
        "--set: unknown key 'guard.enable'; did you mean 'guard.enabled'?"
    )


@pytest.mark.parametrize("flag", ["server", "server.port", ""])
def test_flag_without_equals_sign_is_refused(flag):
    assert "is not of the form key=value" in refusal(flags=[flag])


def test_flag_that_names_a_section_is_refused():
    assert "'server' is a section" in refusal(flags=["server=1"])


@pytest.mark.parametrize("flag", ["=1", "server.port.x=1", "home.x=1", "guard.thresholds.=0.5"])
def test_flag_with_a_path_that_is_no_key_is_refused(flag):
    assert "unknown key" in refusal(flags=[flag])


@pytest.mark.parametrize(
    "flag",
    [
        "server.port=abc",
        "server.port=",
        "server.port=65536",
        "server.port=-1",
        "server.port=1.5",
        "server.host=",
        "server.max_body_bytes=10",
        "server.request_timeout_s=0",
        "server.request_timeout_s=nan",
        "server.request_timeout_s=inf",
        "engine.dtype=int3",
        "engine.sandbox=off",
        "engine.max_batch=0",
        "guard.enabled=maybe",
        "guard.thresholds=0.5",
        "guard.thresholds.jailbreak=1.5",
        "guard.thresholds.jailbreak=nan",
        "guard.thresholds.jailbreak.x=0.5",
        "home=",
    ],
)
def test_flag_with_bad_value_is_refused(flag):
    message = refusal(flags=[flag])
    assert message.startswith("--set")
    assert flag.partition("=")[0].rpartition(".")[0] in message


def test_bad_value_names_its_source_and_key(toml):
    file = toml("[server]\nport = 70000\n")
    assert refusal(file=file) == f"{file}: server.port: Expected `int` <= 65535"
    assert refusal(environ={"PORT": "x"}) == "PORT: server.port: Expected `int`, got `str`"


@pytest.mark.parametrize(
    "text",
    [
        "server = 1\n",
        "[[server]]\nport = 1\n",
        "[server.port]\nx = 1\n",
        "[server]\nport = '9000'\n",
        "[audit]\nrecord_content = 1\n",
        "[guard]\nthresholds = 1\n",
        "[guard.thresholds]\njailbreak = '0.5'\n",
        "home = 3\n",
        "home = 'open\n",
    ],
)
def test_file_with_bad_type_is_refused(toml, text):
    file = toml(text)
    assert str(file) in refusal(file=file, flags=["guard.thresholds.jailbreak=0.5"])


def test_file_that_is_not_text_is_refused(tmp_path):
    file = tmp_path / "fortpoint.toml"
    file.write_bytes(b"\xff\xfe")
    assert "is not valid TOML" in refusal(file=file)


def test_file_that_is_absent_or_a_folder_is_refused(tmp_path):
    assert "cannot read" in refusal(file=tmp_path / "absent.toml")
    assert "cannot read" in refusal(file=tmp_path)


def test_thresholds_from_all_sources_are_joined(toml):
    config = load(
        toml("[guard.thresholds]\njailbreak = 0.1\ninjection = 0.2\n"),
        {"FORTPOINT_GUARD__THRESHOLDS__INJECTION": "0.3"},
        ["guard.thresholds.harmful_request=1"],
    )
    assert config.guard.thresholds == {"jailbreak": 0.1, "injection": 0.3, "harmful_request": 1.0}


def test_thresholds_of_two_loads_are_not_shared():
    load(environ={}, flags=["guard.thresholds.jailbreak=0.5"])
    assert load(environ={}).guard.thresholds == {}


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        Config().server.port = 1


def test_home_path_is_absolute_and_expands_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load(environ={}).home_path == Path("/home/somebody/.fortpoint")
    assert load(environ={"FORTPOINT_HOME": "state"}).home_path == Path.cwd() / "state"


def test_home_path_of_unknown_user_is_refused():
    with pytest.raises(ConfigError, match="no home directory"):
        _ = load(environ={"FORTPOINT_HOME": "~no-such-user-here/x"}).home_path


@pytest.mark.parametrize("key", ALL_KEYS, ids=lambda key: key.name)
def test_keys_each_is_described(key):
    assert key.description.endswith(".")
    assert key.type
    assert key.default


def test_keys_names_are_unique_and_cover_the_tree():
    def leaves(section, prefix=""):
        for name in section.__struct_fields__:
            value = getattr(section, name)
            if isinstance(value, msgspec.Struct):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name

    assert [key.name for key in ALL_KEYS] == list(leaves(Config()))
