"""The guard's policy where its file is read: before the process gives its files up.

    source = load(config)                  # ConfigError says what is wrong, with the line

A policy is read once. A new one needs a new start of the gateway, which loses no connection:
the listening socket outlives it. Light to import: the supervisor reads it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fortpoint.config import Config, Upstream
from fortpoint.engine.upstream.target import Target, key_variables, load_targets
from fortpoint.errors import ConfigError
from fortpoint.guard.policy import SecondStagePolicy
from fortpoint.guard.policy_file import (
    LoadedPolicy,
    known_detectors,
    load_policy,
    shipped_policy,
)


@dataclass(frozen=True)
class PolicySource:
    """A policy, and where its second stage is."""

    loaded: LoadedPolicy
    targets: tuple[Target, ...] = ()


def load(config: Config, environ: Mapping[str, str] | None = None) -> PolicySource:
    """Read the policy that is configured, and its second stage's key. Raises ``ConfigError``."""
    loaded = _loaded(config)
    stage = loaded.policy.second_stage
    if stage is None or not config.guard.enabled:
        return PolicySource(loaded)
    try:
        return PolicySource(loaded, load_targets(_upstream(stage), environ))
    except ConfigError as error:
        said = error.message.replace("upstream.", "second_stage.")
        raise ConfigError(f"{loaded.source}: {said}") from None


def variables(config: Config) -> frozenset[str]:
    """The environment variable that holds the second stage's key, if one does."""
    stage = _loaded(config).policy.second_stage
    return frozenset() if stage is None else key_variables(_upstream(stage))


def _loaded(config: Config) -> LoadedPolicy:
    if not config.guard.policy:
        return shipped_policy(config.guard.secrets)
    return load_policy(Path(config.guard.policy).expanduser(), known_detectors())


def _upstream(stage: SecondStagePolicy) -> Upstream:
    """Its address and key are read like an upstream's."""
    return Upstream(
        urls=(stage.url,),
        model=stage.model or "guard",
        api_keys=(stage.api_key,) if stage.api_key else (),
        allow_plain_http=stage.allow_plain_http,
    )
