"""What the operator watches in every request: alerts where it is active, statistics for each key.

    watch = FeatureWatch(watched(config), ledger, meter)
    sightings = watch.begin()                        # one for each request
    sightings.prompt(0, prefilled.reading)
    sightings.token(event)
    await watch.settle(sightings, request_id, key_id, steered=False)   # before its entry

Tokens that somebody wrote are read: not the template's, and not the first of a prompt, whose
residual stream is a sink of many times the usual length. An answer's token is read when the
next one is chosen, so its last one never is. A prompt that the request steers is read as it is
without steering, like the guard's probes; its answer is read as it was computed.

An alert is in the database before the request's entry, and so before an answer's last byte;
where it cannot be written the request fails. Statistics are added up here and written every few
seconds: a process that is killed loses those.
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from fortpoint.engine.protocol import Token
from fortpoint.errors import AuditUnavailable, ConfigError, EngineError, StorageError
from fortpoint.gateway.metrics import Meter
from fortpoint.gateway.watch_ledger import Alert, FeatureCount, Part
from fortpoint.types import Reading, Role

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FLUSH_S = 5.0
_MOST_PENDING = 4096  # counts that wait to be written

_logger = logging.getLogger("fortpoint.gateway")


class Ledger(Protocol):
    """Where alerts and statistics are kept."""

    async def write(self, found: Sequence[Alert], counts: Sequence[FeatureCount]) -> None: ...

    async def alerts(self, limit: int, before: int | None = None) -> tuple[Alert, ...]: ...

    async def statistics(
        self, limit: int, offset: int = 0, key_id: str | None = None
    ) -> tuple[FeatureCount, ...]: ...


class Sightings:
    """What was seen in one request. Without targets nothing is looked at."""

    def __init__(self, thresholds: Mapping[str, float]) -> None:
        self.names = tuple(thresholds)
        self.n_tokens = 0
        self.over = [0] * len(self.names)
        self.peaks: dict[tuple[int, Part], tuple[float, Role]] = {}
        self.counted = self.settled = False
        self._thresholds = tuple(thresholds.values())
        self._row = struct.Struct(f"<{len(self.names)}f")
        self._prompts: set[int] = set()
        self._answers: set[tuple[str, int]] = set()

    @property
    def on(self) -> bool:
        return bool(self.names)

    @property
    def alerted(self) -> tuple[str, ...]:
        """The targets that were over their thresholds."""
        found = {
            index for (index, _), (peak, _) in self.peaks.items() if self._is_over(index, peak)
        }
        return tuple(self.names[index] for index in sorted(found))

    def crossings(self) -> Iterable[tuple[str, float, float, Role, Part]]:
        """Target, its strongest reading over the threshold, the threshold, who and where."""
        for (index, part), (peak, role) in self.peaks.items():
            if self._is_over(index, peak):
                yield self.names[index], peak, self._thresholds[index], role, part

    def prompt(self, number: int, reading: Reading | None) -> None:
        """A prompt's reading; one that was seen already is not counted again.

        Raises ``EngineError`` for a reading without all that is watched: to go on would be not
        to watch.
        """
        if not self.names or number in self._prompts:
            return
        values = self._values(reading)
        self._prompts.add(number)
        for segment in reading.segments if reading else ():
            rows = values[max(segment.start, 1) : segment.end]
            if segment.role is not Role.TEMPLATE and len(rows):
                over = (rows > self._thresholds).sum(axis=0).tolist()
                self._add("prompt", segment.role, len(rows), over, rows.max(axis=0).tolist())

    def token(self, event: Token) -> None:
        """One token of an answer. Raises ``EngineError`` for a reading that does not fit."""
        if not self.names or event.reading is None:
            return
        answer = (event.id, event.choice)
        if answer not in self._answers:  # was read at the prompt's last token
            self._answers.add(answer)
            return
        try:
            row = self._row.unpack(event.reading.target_values)
        except struct.error:
            raise _unfit() from None
        over = [int(self._is_over(index, value)) for index, value in enumerate(row)]
        self._add("answer", Role.ASSISTANT, 1, over, row)

    def maximum(self, index: int) -> float:
        return max(peak for (i, _), (peak, _) in self.peaks.items() if i == index)

    def _is_over(self, index: int, value: float) -> bool:
        return value > self._thresholds[index]

    def _add(
        self, part: Part, role: Role, n_tokens: int, over: Sequence[int], peaks: Sequence[float]
    ) -> None:
        self.n_tokens += n_tokens
        for index, (n_over, peak) in enumerate(zip(over, peaks, strict=True)):
            self.over[index] += n_over
            known = self.peaks.get((index, part))
            if known is None or peak > known[0]:
                self.peaks[index, part] = (peak, role)

    def _values(self, reading: Reading | None) -> NDArray[np.float32]:
        """``[n_tokens, n_targets]``."""
        import numpy as np

        if reading is None or reading.targets != self.names:
            raise EngineError("the engine did not read all that is watched")
        try:
            values = np.frombuffer(reading.target_values, "<f4")
            values = values.reshape(reading.n_tokens, len(self.names))
        except ValueError:
            raise _unfit() from None
        ends = [segment.end for segment in reading.segments]
        if not np.isfinite(values).all() or max(ends, default=0) > reading.n_tokens:
            raise _unfit()
        return values


class FeatureWatch:
    """What is watched, for one gateway process; writes to ``ledger``."""

    def __init__(
        self, thresholds: Mapping[str, float], ledger: Ledger | None, meter: Meter
    ) -> None:
        if thresholds and ledger is None:
            raise ConfigError("watch.targets needs a database for its alerts")
        self.thresholds = dict(thresholds)
        self.ledger = ledger
        self._meter = meter
        self._pending: dict[tuple[str, str], FeatureCount] = {}
        self._flushed_at = time.monotonic()

    def begin(self) -> Sightings:
        return Sightings(self.thresholds)

    async def settle(
        self, sightings: Sightings, request_id: str, key_id: str, *, steered: bool
    ) -> None:
        """Keep what a request showed. A second call changes nothing, unless the first failed.

        Raises ``AuditUnavailable`` where alerts cannot be written.
        """
        if sightings.settled or not sightings.n_tokens:
            return
        now = datetime.now(UTC)
        found = [
            Alert(
                time=now,
                request_id=request_id,
                key_id=key_id,
                target=target,
                value=value,
                threshold=threshold,
                role=role,
                part=part,
                steered=steered,
            )
            for target, value, threshold, role, part in sightings.crossings()
        ]
        if not sightings.counted:
            sightings.counted = True
            self._count(sightings, key_id, now)
            for alert in found:
                self._tell(alert)
        await self._write(found, self._take_due())
        sightings.settled = True

    async def flush(self) -> None:
        """Write the statistics that wait. Raises ``AuditUnavailable``."""
        await self._write([], self._take())

    def _count(self, sightings: Sightings, key_id: str, now: datetime) -> None:
        for index, target in enumerate(sightings.names):
            count = FeatureCount(
                key_id=key_id,
                target=target,
                tokens=sightings.n_tokens,
                tokens_over=sightings.over[index],
                maximum=sightings.maximum(index),
                last_over_at=now if sightings.over[index] else None,
            )
            self._keep([count])
            self._meter.watched(target, count.tokens, count.tokens_over)

    def _tell(self, alert: Alert) -> None:
        self._meter.alerted(alert.target, alert.part)
        _logger.warning(
            "alert request=%s key=%s target=%s value=%.4f above=%.4f role=%s part=%s steered=%s",
            alert.request_id,
            alert.key_id,
            alert.target,
            alert.value,
            alert.threshold,
            alert.role.value,
            alert.part,
            str(alert.steered).lower(),
        )

    def _keep(self, counts: Iterable[FeatureCount]) -> None:
        for count in counts:
            place = (count.key_id, count.target)
            known = self._pending.get(place)
            self._pending[place] = count if known is None else known.plus(count)

    def _take_due(self) -> list[FeatureCount]:
        late = time.monotonic() - self._flushed_at > _FLUSH_S
        return self._take() if late or len(self._pending) > _MOST_PENDING else []

    def _take(self) -> list[FeatureCount]:
        taken = list(self._pending.values())
        self._pending.clear()
        self._flushed_at = time.monotonic()
        return taken

    async def _write(self, found: Sequence[Alert], counts: list[FeatureCount]) -> None:
        if self.ledger is None or not (found or counts):
            return
        try:
            await self.ledger.write(found, counts)
        except StorageError as error:
            self._put_back(counts)
            raise AuditUnavailable(f"the alerts could not be written: {error.message}") from None
        except BaseException:
            self._put_back(counts)
            raise

    def _put_back(self, counts: list[FeatureCount]) -> None:
        """They are older than what came meanwhile."""
        newer = list(self._pending.values())
        self._pending.clear()
        self._keep([*counts, *newer])


def _unfit() -> EngineError:
    return EngineError("the engine sent readings that do not fit their tokens")
