"""Tokens to text as they come, without half characters and without stop strings.

A character may span tokens: text is given out only once it is complete. A stop string may
span them too: as long as the end of the text could still become one, it is held back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
_MAX_PENDING_TOKENS = 8


class Detokenizer:
    """One answer's text. ``decode`` maps token ids to text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._pending: list[int] = []  # tokens whose text is not complete yet
        self._context: list[int] = []  # last complete tokens: some decoders strip a first space
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Text that became ready with this token; maybe empty. Sets ``stopped``."""
        self._pending.append(token)
        text = self._complete_text(final=False)
        return self._release(text, final=False)

    def finish(self) -> str:
        """What is left when no more tokens come."""
        return "" if self.stopped else self._release(self._complete_text(final=True), final=True)

    def _complete_text(self, *, final: bool) -> str:
        before = self._decode(self._context)
        after = self._decode(self._context + self._pending)
        incomplete = after.endswith(_REPLACEMENT) and len(self._pending) < _MAX_PENDING_TOKENS
        if incomplete and not final:
            return ""
        self._context = self._pending[-_MAX_PENDING_TOKENS:]
        self._pending = []
        return after[len(before) :]

    def _release(self, text: str, *, final: bool) -> str:
        self._held += text
        found = [i for stop in self._stop if (i := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = 0 if final else self._possible_stop()
        text, self._held = self._held[: len(self._held) - keep], self._held[-keep:] if keep else ""
        return text

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        return max(
            (
                n
                for stop in self._stop
                for n in range(1, min(len(stop), len(self._held) + 1))
                if self._held.endswith(stop[:n])
            ),
            default=0,
        )
