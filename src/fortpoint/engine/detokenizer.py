"""Tokens to text as they come, without half characters and without stop strings.

A character may span tokens: text is given out only once it is complete. A stop string may
span them too: as long as the end of the text could still become one, it is held back.

A token's text depends on those before it (some decoders strip a first space), so a few of them
are decoded with it. Their own text is kept from the last time: one decoding a token, and a
second one now and then, when they have become too many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
_MAX_PENDING_TOKENS = 8
_MAX_CONTEXT_TOKENS = 6


class Detokenizer:
    """One answer's text. ``decode`` maps token ids to text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._pending: list[int] = []  # tokens whose text is not complete yet
        self._context: list[int] = []  # last complete tokens, and
        self._context_text = ""  # their text
        self.held = ""  # whole characters that may yet become a stop string
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
        if not self._pending:
            return ""
        tokens = self._context + self._pending
        text = self._decode(tokens)
        incomplete = text.endswith(_REPLACEMENT)
        if incomplete and not final and len(self._pending) < _MAX_PENDING_TOKENS:
            return ""
        ready = text[len(self._context_text) :]
        if incomplete or len(tokens) > _MAX_CONTEXT_TOKENS:
            tokens, text = self._pending, self._decode(self._pending)
        self._context, self._context_text, self._pending = tokens, text, []
        return ready

    def _release(self, text: str, *, final: bool) -> str:
        if not self._stop:
            return text
        self.held += text
        found = [i for stop in self._stop if (i := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self.held = self.held[: min(found)], ""
            return text
        keep = 0 if final else self._possible_stop()
        text, self.held = self.held[: len(self.held) - keep], self.held[-keep:] if keep else ""
        return text

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        return max(
            (
                n
                for stop in self._stop
                for n in range(1, min(len(stop), len(self.held) + 1))
                if self.held.endswith(stop[:n])
            ),
            default=0,
        )
