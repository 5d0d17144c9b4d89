"""A trace in words that a lawyer can read, with the numbers that an expert can check."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime

from fortpoint.vault.fingerprint import EPSILON
from fortpoint.vault.leases import Lease
from fortpoint.vault.trace import MIN_TESTS, OVERALL_LEVEL, Trace

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#])")
_MOST_ROWS = 50


def markdown(
    trace: Trace,
    leases: Mapping[str, Lease],
    model: str,
    suspect_sha256: str,
    made_at: int,
    uncounted: int = 0,
) -> str:
    """``leases`` by id. ``uncounted`` have keys without the hash that was committed."""
    digest = next((lease.terms.digest for lease in leases.values()), "none")
    parts = [
        f"# Was {_plain(trace.suspect)} made from a leased copy of {_plain(model)}?",
        _answer(trace, leases),
        _compared(trace, model, digest, suspect_sha256, made_at, uncounted),
        _hypothesis(trace, max((lease.epsilon for lease in leases.values()), default=EPSILON)),
        _table(trace, leases),
        _LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


def _answer(trace: Trace, leases: Mapping[str, Lease]) -> str:
    if not trace.identified:
        return (
            "## Answer\n\n**No lease is identified.** This does not show that the file is innocent:"
            " the mark may be too weak in it to be found, or its copy was made without a lease."
        )
    lines = ["## Answer\n", "**Identified at an overall error of one in a billion:**\n"]
    for finding in trace.identified:
        terms = leases[finding.lease].terms
        lines.append(
            f"- lease `{finding.lease}`, given to **{_plain(terms.holder)}** for the host "
            f"`{_plain(terms.host)}` from {_day(terms.issued_at)} to {_day(terms.expires_at)}: "
            f"the chance of so much agreement without that copy is {_odds(finding.p, 1)}, and "
            f"{_odds(finding.p, trace.n_tests)} counting every comparison"
        )
    if len(trace.identified) > 1:
        lines.append("\nMore than one: the file holds parts of several copies (collusion).")
    return "\n".join(lines)


def _compared(
    trace: Trace, model: str, digest: str, sha256: str, made_at: int, uncounted: int
) -> str:
    rows = [
        "## What was compared\n",
        f"- the suspect: {_plain(trace.suspect)}, SHA-256 `{sha256}`",
        f"- the original: {_plain(model)}, digest `{digest}`, which never left unmarked",
        f"- weights that could be compared: {trace.n_weights:,}",
        f"- leases whose copies could have been the source: {trace.n_leases:,}",
        f"- this report was made on {_day(made_at)} (UTC)",
    ]
    if trace.missing:
        rows.append(f"- matrices that the suspect lacks or has in another shape: {trace.missing}")
    if trace.turned:
        rows.append("- the suspect's hidden coordinates had been rotated; this was undone")
    if uncounted:
        rows.append(
            f"- **{uncounted} leases were not counted**: their keys do not have the hash that was "
            "committed when they were issued"
        )
    return "\n".join(rows)


def _hypothesis(trace: Trace, epsilon: float) -> str:
    return f"""## The hypothesis and the test

Each copy that is released carries noise of its own: to every weight a random number is added,
{epsilon:.1%} of the spread of the weight's row, too little to change how the model answers. The
numbers come from a secret key of that lease. The hash of the key was entered in the audit log
**before** the copy was released, so that no key can have been chosen afterwards to fit this file.

*The hypothesis that is tested, for each lease*: this file has nothing to do with that lease's copy.

The difference between the file and the original is multiplied with the lease's random numbers
and divided by its own length. If the hypothesis is true, the random numbers are independent of
the file, whatever was done to the file, and the result T behaves like a standard normal number:
the chance that it reaches t is at most exp(-t^2/2), exactly and for every t. This holds for any
quantisation, pruning, merging, further training or rearrangement, since these can only make T
smaller for the guilty and never larger for the innocent.

{trace.n_tests:,} comparisons are counted (every lease that was looked at, and never fewer than
{MIN_TESTS:,}): a lease is identified when that many times its chance is at most {OVERALL_LEVEL:g},
which is T above {trace.threshold:.2f}."""


def _table(trace: Trace, leases: Mapping[str, Lease]) -> str:
    lines = [
        "## Every lease\n" if trace.n_leases <= _MOST_ROWS else f"## The first {_MOST_ROWS}\n",
        "| lease | holder | T | weights | chance if innocent | counting all | identified |",
        "|---|---|---|---|---|---|---|",
    ]
    for finding in trace.findings[:_MOST_ROWS]:
        holder = _plain(leases[finding.lease].terms.holder)
        lines.append(
            f"| `{finding.lease}` | {holder} | {finding.statistic:.2f} | {finding.n_weights:,} "
            f"({finding.scope}) | {_odds(finding.p, 1)} | {_odds(finding.p, trace.n_tests)} "
            f"| {'**yes**' if finding.identified else 'no'} |"
        )
    return "\n".join(lines)


_LIMITS = """## What would make this wrong

- **The key was known to somebody else.** Who has a lease's key, or the secret that all are made
  from, can put that lease's mark into any file. Who could open it is in the audit log and in the
  key server's.
- **The copy was taken from its holder.** The test names the copy, not the person who leaked it.
- **The hash was not committed before the release.** Check its entry: `fortpoint audit verify`.
- **The original is not the one that was marked.** Its digest is above.
- **The cipher is broken.** The random numbers are AES-256's; the test takes them for random.

A file can be guilty and not be found: one that was trained from answers alone keeps no weights, and
who has the unmarked original can take the mark off. Nothing follows from a lease not being
identified."""


def _odds(p: float, times: int) -> str:
    """``p`` times a count as a power of ten: exp(-t^2/2) is below what a float holds."""
    return f"{min(1.0, p * times):.2g}" if p > 0 else "below 1e-300"


def _day(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M")


def _plain(text: str) -> str:
    """Names that others chose, without Markdown and on one line."""
    return _MARKDOWN.sub(r"\\\1", "".join(c for c in text[:200] if c.isprintable()))
