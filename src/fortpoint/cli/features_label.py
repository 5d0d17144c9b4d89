"""``fortpoint features label``: labels by any OpenAI-compatible model, which is also their judge.

    fortpoint features label mine --harvest activations --with http://127.0.0.1:11434/v1 --model m

Contexts of the harvest are sent to that server: use one that may see them. A label is kept
when it predicts unseen text better than the one that is there, or with ``--always``. What is
done is saved as it goes; the same command goes on with the features that are left.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from fortpoint.cli.progress import Progress
from fortpoint.errors import ConfigError, EngineError, FortPointError, InvalidRequest
from fortpoint.types import Message

if TYPE_CHECKING:
    from fortpoint.config import Upstream
    from fortpoint.engine.upstream.http import Http
    from fortpoint.engine.upstream.target import Target
    from fortpoint.features.understanding.explaining import Explained
    from fortpoint.features.understanding.index import Feature, Index
    from fortpoint.features.understanding.rules import Table
    from fortpoint.features.understanding.survey import Part

_SAVE_EVERY = 64
_MAX_FAILURES = 5
_ATTEMPTS = 4
_LONGEST_PAUSE_S = 30.0
_MAX_ANSWER_BYTES = 256 * 1024
_SPELLINGS = {
    "upstream.urls": "--with",
    "upstream.api_keys": "--key",
    "set upstream.allow_plain_http=true": "give --allow-plain-http",
}


def label(
    dictionary: Annotated[str, typer.Argument(metavar="DICTIONARY", help="Its name or folder.")],
    harvest: Annotated[Path, typer.Option(help="Folder of `features harvest`, for unseen text.")],
    url: Annotated[
        str, typer.Option("--with", metavar="URL", help="As https://models.example/v1.")
    ],
    model: Annotated[str, typer.Option("--model", help="The labelling model's name there.")],
    key: Annotated[
        str, typer.Option("--key", help="Where its key is: env:NAME or file:/path.")
    ] = "",
    held_out: Annotated[
        int, typer.Option(min=1, help="Shards at the end that judge, as for `describe`.")
    ] = 4,
    limit: Annotated[int, typer.Option(min=0, help="Features at most; 0 labels all.")] = 0,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Questions at once.")] = 4,
    timeout_s: Annotated[float, typer.Option(min=1, help="For one answer.")] = 60.0,
    always: Annotated[
        bool, typer.Option("--always", help="Keep the model's label where it is worse, too.")
    ] = False,
    allow_plain_http: Annotated[
        bool, typer.Option("--allow-plain-http", help="Send contexts unencrypted, not only here.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Have a labelling model name features, and judge its names on unseen text."""
    from fortpoint.cli.features_understand import model_of, opened_with
    from fortpoint.features.understanding import survey as surveying
    from fortpoint.features.understanding.index import Index

    client = Client.of(url, model, key, timeout_s, allow_plain_http)
    place, store, loaded = opened_with(dictionary, harvest)
    index = Index.load(place.folder, loaded.n_features)
    texts = model_of(store).texts
    with Progress() as progress:
        part = surveying.unseen(store, loaded, held_out, progress.update)
        work = _Work(index, place.folder, part, texts, model, always)
        wanted = work.wanted(limit)
        asyncio.run(work.run(client, wanted, parallel, progress.update))
    found = {"asked": len(wanted), "kept": work.n_kept, "failed": work.n_failed, **work.means()}
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
    else:
        typer.echo(
            f"{found['asked']} features asked about: {work.n_kept} labels kept, "
            f"{work.n_failed} failed"
        )
        for name, value in work.means().items():
            typer.echo(f"{name}  {'none' if value is None else f'{value:.3f}'}")


class _Work:
    """The index while it is labelled anew."""

    def __init__(
        self,
        index: Index,
        folder: Path,
        part: Part,
        texts: Sequence[str],
        model: str,
        always: bool,
    ) -> None:
        self._index, self._folder, self._part, self._texts = index, folder, part, texts
        self._model, self._always = model[:128], always
        self._features = list(index.features)
        self._table = _table(part)
        self._scores: list[tuple[float, float | None]] = []
        self._unsaved = 0
        self.n_kept = self.n_failed = 0
        self._failures_in_row = 0

    def wanted(self, limit: int) -> list[Feature]:
        """Live features that this model has not labelled, in their order."""
        found = [
            f
            for f in self._features
            if f.frequency > 0 and f.contexts and f.labeller != self._model
        ]
        return found[:limit] if limit else found

    async def run(
        self,
        client: Client,
        wanted: Sequence[Feature],
        parallel: int,
        progress: Callable[[str, int, int], None],
    ) -> None:
        """Raises the last ``EngineError`` when several came in a row; what is done is saved."""
        places = asyncio.Semaphore(parallel)
        done = 0

        async def one(feature: Feature) -> None:
            nonlocal done
            async with places:
                await self._label(client, feature)
            done += 1
            progress("label", done, len(wanted))

        try:
            async with client, asyncio.TaskGroup() as group:
                for feature in wanted:
                    group.create_task(one(feature))
        except* FortPointError as several:
            raise _first(several) from None
        finally:
            self._save()

    def means(self) -> dict[str, float | None]:
        """Of the features that this run asked about and could judge."""
        new = [score for score, _ in self._scores]
        old = [score for _, score in self._scores if score is not None]
        return {
            "mean score of its labels": sum(new) / len(new) if new else None,
            "mean score of the labels before": sum(old) / len(old) if old else None,
        }

    async def _label(self, client: Client, feature: Feature) -> None:
        import numpy as np

        from fortpoint.features.understanding import scoring
        from fortpoint.features.understanding.explaining import explain

        try:
            trial = scoring.trial(
                self._table,
                feature.index,
                np.array([kin.index for kin in feature.neighbours], np.int64),
                scoring.Settings(),
            )
            made = await explain(feature, client, self._part.passages, trial, self._texts)
        except EngineError:
            self.n_failed += 1
            self._failures_in_row += 1
            if self._failures_in_row >= _MAX_FAILURES:
                raise
            return
        self._failures_in_row = 0
        self._keep(feature, made)

    def _keep(self, feature: Feature, made: Explained) -> None:
        score = None if made.score is None else round(made.score.balanced, 3)
        if score is not None:
            self._scores.append((score, feature.label_score))
        better = score is not None and score > (feature.label_score or 0.0)
        if better or self._always:
            self._features[feature.index] = msgspec.structs.replace(
                feature, label=made.label, label_score=score, labeller=self._model
            )
            self.n_kept += 1
            self._unsaved += 1
            if self._unsaved >= _SAVE_EVERY:
                self._save()

    def _save(self) -> None:
        if self._unsaved:
            self._index.with_features(tuple(self._features)).save(self._folder)
            self._unsaved = 0


def _table(part: Part) -> Table:
    """The held-out text without terms: a model judges, no rule."""
    import numpy as np

    from fortpoint.features.understanding.incidence import Incidence
    from fortpoint.features.understanding.rules import Table

    starts = np.zeros(len(part.passages) + 1, np.int64)
    return Table.of(Incidence(starts, np.empty(0, np.int32), 0), part.by_feature, part.kept)


def _first(several: BaseExceptionGroup[FortPointError]) -> FortPointError:
    for error in _flat(several):
        return error
    raise several


def _flat(several: BaseExceptionGroup[FortPointError]) -> Iterator[FortPointError]:
    for error in several.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _flat(error)
        else:
            yield error


class _Message(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    message: _Message


class _Answer(msgspec.Struct, frozen=True):
    choices: list[_Choice]


@dataclass
class Client:
    """An ``explaining.Labeller`` over HTTP; used as a context manager in a running loop.

    Address, key and certificates are checked as for the engine's upstreams; redirects are not
    followed and answers have a limit.
    """

    config: Upstream
    target: Target
    timeout_s: float
    _http: Http | None = None

    @classmethod
    def of(cls, url: str, model: str, key: str, timeout_s: float, plain: bool) -> Client:
        """Raises ``InvalidRequest`` for an address or a reference to a key that is none."""
        from fortpoint.config import Upstream
        from fortpoint.engine.upstream.target import load_targets

        if not url or not model:
            raise InvalidRequest("name a server with --with and its model with --model")
        config = Upstream(
            urls=(url,),
            model=model,
            api_keys=(key,) if key else (),
            allow_plain_http=plain,
            max_answer_bytes=_MAX_ANSWER_BYTES,
        )
        try:
            return cls(config, load_targets(config)[0], timeout_s)
        except ConfigError as error:
            message = error.message
            for theirs, ours in _SPELLINGS.items():
                message = message.replace(theirs, ours)
            raise InvalidRequest(message) from None

    async def __aenter__(self) -> Client:
        from fortpoint.engine.upstream.http import Http

        self._http = Http(self.config, tls=self.target.tls)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._http is not None:
            await self._http.close()

    async def answer(self, messages: Sequence[Message], max_tokens: int) -> str:
        """Raises ``EngineError`` after some attempts, or at once where another is of no use."""
        from fortpoint.engine.upstream.http import Fault

        body = msgspec.json.encode(
            {
                "model": self.config.model,
                "messages": messages,
                "temperature": 0,
                self.config.max_tokens_field: max_tokens,
            }
        )
        pause = 0.5
        for attempt in range(_ATTEMPTS):
            try:
                return await self._ask(body)
            except Fault as fault:
                if not fault.elsewhere or attempt + 1 == _ATTEMPTS:
                    raise _as_engine_error(fault.error) from None
                pause = min(max(pause * 2, fault.wait_s or 0.0), _LONGEST_PAUSE_S)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
        raise AssertionError("unreachable")

    async def _ask(self, body: bytes) -> str:
        if self._http is None:
            raise ValueError("the client is used within `async with`")
        deadline = asyncio.get_running_loop().time() + self.timeout_s
        reply = await self._http.post(self.target, "/chat/completions", body, deadline)
        try:
            raw = await reply.read_all(deadline)
        finally:
            reply.close()
        try:
            choices = msgspec.json.decode(raw, type=_Answer).choices
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise EngineError("the labelling model's answer is not in OpenAI's format") from None
        if not choices:
            raise EngineError("the labelling model answered with no choice")
        return choices[0].message.content or ""


def _as_engine_error(error: FortPointError) -> EngineError:
    """A refusal counts as a failure of this question too."""
    return error if isinstance(error, EngineError) else EngineError(error.message)
