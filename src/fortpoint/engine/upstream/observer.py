"""Whether a model of our own runs beside the upstreams: to read along, never to answer."""

from __future__ import annotations

from fortpoint.config import Config


def reads_along(config: Config) -> bool:
    """The guard's probes need a model to read; here ``engine.model`` observes for them."""
    return is_upstream(config) and config.guard.enabled and config.guard.probes


def runs_a_model(config: Config) -> bool:
    """False where no engine process is needed, and so no weights either."""
    return not is_upstream(config) or reads_along(config)


def is_upstream(config: Config) -> bool:
    return config.engine.kind == "upstream"
