"""The plain page at ``/``: what is running, and what to try next.

Public on purpose and without anything secret. One file, no scripts, nothing from elsewhere:
the content security policy allows only this style sheet, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from functools import cache
from importlib.resources import files
from string import Template

from fortpoint import __version__
from fortpoint.engine.protocol import Description

_STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)


def render(
    description: Description | None, detectors: tuple[str, ...] | None, base_url: str
) -> str:
    """The page. ``detectors`` is None when the guard is off."""
    guard = "off" if detectors is None else "on: " + ", ".join(detectors)
    values = {
        "version": __version__,
        "state": "ready" if description else "starting: the engine does not answer yet",
        "model": description.model if description else "-",
        "digest": description.digest if description else "-",
        "guard": guard,
        "protections": _protections(description),
        "base_url": base_url,
    }
    return _template().substitute({name: html.escape(text) for name, text in values.items()})


def security_headers() -> dict[str, str]:
    """Headers of the page; nothing may be loaded, framed or posted."""
    style = _STYLE.search(_source())
    digest = base64.b64encode(hashlib.sha256(style[1].encode() if style else b"").digest())
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest.decode()}'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "content-security-policy": policy,
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }


def _protections(description: Description | None) -> str:
    if description is None or not description.protections:
        return "-"
    return ", ".join(
        f"{name} {'on' if active else 'OFF'}"
        for name, active in sorted(description.protections.items())
    )


def _template() -> Template:
    return Template(_source())


@cache
def _source() -> str:
    return files("fortpoint.gateway").joinpath("page.html").read_text(encoding="utf-8")
