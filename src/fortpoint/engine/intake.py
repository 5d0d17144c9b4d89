"""From a request to a job: everything that can be refused is refused here, before it waits.

    job = intake.prepare(request)      # in any thread; raises what the caller is told

Tokens, the chat template, a JSON Schema and steering come from outside; a long text or a large
schema takes its time, so this runs beside the event loop and beside the compute thread.
"""

from __future__ import annotations

from collections.abc import Mapping

from fortpoint.engine.chat import ChatTokenizer, Prompt
from fortpoint.engine.grammar import Grammar, GrammarCompiler
from fortpoint.engine.model import Adapter
from fortpoint.engine.protocol import Embed, Generate, Scan, ScoreText
from fortpoint.engine.sequence import Asked, Job
from fortpoint.engine.steering import Plan
from fortpoint.engine.taps import Taps
from fortpoint.errors import ContextLengthExceeded, InvalidRequest, Unsupported
from fortpoint.features.library import Library

_SHOWN_NAMES = 5


class Intake:
    """What requests may ask for: this tokenizer, library, these adapters."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        max_context: int,
        library: Library,
        taps: Taps,
        adapters: Mapping[str, Adapter],
        grammars: GrammarCompiler | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_context = max_context
        self._library = library
        self._taps = taps
        self._adapters = adapters
        self._grammars = grammars

    def prepare(self, job: Job) -> None:
        """Fill in what ``job.request`` asks for. Raises a ``FortPointError``."""
        request = job.request
        job.prompts = self._prompts(request)
        if isinstance(request, ScoreText):
            job.continuation = self._continuation(request)
        self._check_lengths(job)
        if isinstance(request, Generate | ScoreText):
            stop_when = request.stop_when if isinstance(request, Generate) else ()
            job.plan = Plan.compile(request.steer, stop_when, self._library)
            job.adapter = self._adapter(request.adapter)
        if isinstance(request, Generate):
            self._taps.check(request.watch)
            job.grammar = self._grammar(request.sampling.json_schema)

    def _prompts(self, request: Asked) -> tuple[Prompt, ...]:
        match request:
            case Embed(texts=texts):
                prompts = tuple(self._tokenizer.text(text) for text in texts)
            case Generate(prompt=str(text)) | ScoreText(prompt=str(text)):
                prompts = (self._tokenizer.text(text),)
            case Generate(messages=messages) | Scan(messages=messages):
                prompts = (self._tokenizer.chat(messages or ()),)
            case ScoreText(messages=messages):
                prompts = (self._tokenizer.chat(messages or ()),)
        if not prompts:
            raise InvalidRequest("there is no text to read")
        return prompts

    def _continuation(self, request: ScoreText) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode_text(request.continuation))

    def _check_lengths(self, job: Job) -> None:
        n_more = 1 if job.is_generation else len(job.continuation)
        if job.is_score and len(job.continuation) < (1 if job.n_prompt_tokens else 2):
            raise InvalidRequest(
                "there is nothing to score; send a longer continuation", param="continuation"
            )
        for prompt in job.prompts:
            if not prompt.tokens and not job.is_score:
                raise InvalidRequest("a text has no tokens; send at least one character")
            if len(prompt.tokens) + n_more > self._max_context:
                raise ContextLengthExceeded(
                    f"this model's context holds {self._max_context} tokens, "
                    f"the prompt has {len(prompt.tokens)}"
                    + (f" and its continuation {n_more}" if job.is_score else "")
                    + "; shorten it"
                )

    def _adapter(self, name: str | None) -> Adapter | None:
        if name is None:
            return None
        found = self._adapters.get(name)
        if found is None:
            here = ", ".join(sorted(self._adapters)[:_SHOWN_NAMES]) or "none"
            raise InvalidRequest(
                f"there is no adapter {name[:64]!r} (here: {here})", param="adapter"
            )
        return found

    def _grammar(self, schema: str | None) -> Grammar | None:
        if schema is None:
            return None
        if self._grammars is None:
            raise Unsupported("this model's tokenizer cannot follow a JSON schema")
        return self._grammars.compile(schema)
