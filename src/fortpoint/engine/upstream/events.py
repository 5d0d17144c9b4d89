"""Server-sent events as an OpenAI-compatible server writes them, from hostile bytes.

    reader = EventReader(max_event_bytes=1 << 20)
    for data in reader.feed(chunk): ...               # the ``data`` of each whole event

What waits for its end (a line that never ends, an event that never closes) is limited.
Anything but a known field is an error: a server that writes garbage is not one to believe.
Lines end in LF or CRLF.
Source: html.spec.whatwg.org, section 9.2.6 "Interpreting an event stream".
"""

from __future__ import annotations

from fortpoint.errors import EngineError

_IGNORED = frozenset({b"event", b"id", b"retry"})


class EventReader:
    """Of one response. Reads each byte once, however small the pieces are that come."""

    def __init__(self, max_event_bytes: int) -> None:
        self._max_bytes = max_event_bytes
        self._line: list[bytes] = []  # the begun line, in the pieces that came
        self._data: list[bytes] = []  # the begun event's data lines
        self._n_waiting = 0  # bytes of both

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of each event that is whole now. Raises ``EngineError``."""
        self._line.append(chunk)
        self._n_waiting += len(chunk)
        found: list[bytes] = []
        if b"\n" in chunk:
            *lines, rest = b"".join(self._line).split(b"\n")
            for line in lines:
                self._take(line.removesuffix(b"\r"), found)
            self._line = [rest]
            self._n_waiting = len(rest) + sum(map(len, self._data))
        if self._n_waiting > self._max_bytes:
            raise EngineError("an upstream server sent an event that is too large")
        return found

    def _take(self, line: bytes, found: list[bytes]) -> None:
        if line.startswith(b"data:"):
            self._data.append(line[6:] if line[5:6] == b" " else line[5:])
        elif line:
            # A comment (it begins with a colon), or a field that says nothing to us.
            if line[:1] != b":" and line.partition(b":")[0] not in _IGNORED:
                raise EngineError("an upstream server sent what is not an event stream")
        elif self._data:
            found.append(b"\n".join(self._data))
            self._data = []
