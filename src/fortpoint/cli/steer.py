"""``fortpoint steer``: ask the running model with a feature turned up, down or out.

    fortpoint steer golden-gate --strength 1 "What do you like?"
    fortpoint steer smollm2-135m-l9/4489 --strength 1,1.5,2 --compare "What do you like?"

The operator's own tool: it asks the engine of this home over its socket, so the guard judges
nothing. What was asked for is in the record before the first token is printed.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from fortpoint.errors import EngineUnavailable, FortPointError, InvalidRequest

if TYPE_CHECKING:
    from fortpoint.cli.steer_target import Found
    from fortpoint.config import Config
    from fortpoint.engine.client import EngineClient
    from fortpoint.engine.protocol import Description, Generate

MAX_STRENGTH = 100.0
_MAX_STRENGTHS = 16
_MAX_PROMPT_CHARS = 256 * 1024
_MAX_COLUMNS = 3


class Mode(StrEnum):
    clamp = "clamp"
    add = "add"
    ablate = "ablate"


class Scope(StrEnum):
    all = "all"
    answer = "answer"


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What to ask, and how to change the model meanwhile."""

    target: str
    prompt: str
    mode: str
    scope: str
    max_tokens: int
    temperature: float
    seed: int | None


class Steered(msgspec.Struct, frozen=True, kw_only=True):
    """One answer; ``strength`` is None for the model as it is. ``error`` says why it broke off."""

    strength: float | None
    text: str
    finish_reason: str | None
    tokens: int
    error: str | None = None


def steer(
    target: Annotated[
        str,
        typer.Argument(help="A direction, <dictionary>/<index>, or words that name a feature."),
    ],
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    strength: Annotated[str, typer.Option(help="In training maxima; several as 0.5,1,2.")] = "1",
    mode: Annotated[Mode, typer.Option(help="Set it, add to it, or remove it.")] = Mode.clamp,
    scope: Annotated[Scope, typer.Option(help="Everywhere, or in the answer only.")] = Scope.all,
    max_tokens: Annotated[int, typer.Option(min=1, max=100_000, help="Of each answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 takes the likeliest.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the unsteered answer beside the steered.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ask the running model with a feature turned up, down or out."""
    from fortpoint.config import load

    strengths = parse_strengths(strength, mode)
    if not prompt.strip() or len(prompt) > _MAX_PROMPT_CHARS or "\x00" in prompt:
        raise InvalidRequest("the prompt is empty, too long, or holds a NUL", param="prompt")
    wish = Wish(
        target=target,
        prompt=prompt,
        mode=mode.value,
        scope=scope.value,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
    )
    shown: list[float | None] = [None, *strengths] if compare else [*strengths]
    together = compare or as_json
    found, model, answers = asyncio.run(_steer(load(), wish, shown, together))
    if as_json:
        _print_json(found, model, wish, answers)
    elif compare:
        print_beside(found.target, wish.mode, answers)
    if any(answer.error for answer in answers):
        raise typer.Exit(1)


def parse_strengths(text: str, mode: Mode) -> list[float]:
    """Numbers between commas, each once. Raises ``InvalidRequest``."""
    if mode is Mode.ablate:  # removes all there is
        return [0.0]
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise InvalidRequest(
            "a strength is a number, and several are written as 0.5,1,2", param="strength"
        ) from None
    if not all(math.isfinite(one) and abs(one) <= MAX_STRENGTH for one in found):
        raise InvalidRequest(
            f"a strength is a number from -{MAX_STRENGTH:g} to {MAX_STRENGTH:g}, in units of the "
            "feature's training maximum",
            param="strength",
        )
    if len(found) > _MAX_STRENGTHS:
        raise InvalidRequest(f"at most {_MAX_STRENGTHS} strengths at once", param="strength")
    return list(dict.fromkeys(found))


async def _steer(
    config: Config, wish: Wish, strengths: Sequence[float | None], together: bool
) -> tuple[Found, Description, list[Steered]]:
    from fortpoint.cli.steer_target import named
    from fortpoint.features.shipped import ARTEFACTS
    from fortpoint.home import Home

    home = Home(config.home_path)
    async with running_engine(home.engine_socket) as (engine, model):
        found = named(wish.target, model, (home.features, ARTEFACTS))
        _say_found(found)
        wish = msgspec.structs.replace(wish, target=found.target)
        await _record(config.state_path, model, wish, strengths)
        if together:
            asked = [_answer(engine, wish, one, i, _quiet) for i, one in enumerate(strengths)]
            return found, model, list(await asyncio.gather(*asked))
        answers = []
        for i, one in enumerate(strengths):
            if len(strengths) > 1:
                title = _title(found.target, wish.mode, one)
                typer.echo(f"\n{title}:" if i else f"{title}:")
            answers.append(await _answer(engine, wish, one, i, _print_piece))
            typer.echo()
            if answers[-1].error:
                typer.echo(f"error: {answers[-1].error}", err=True)
        return found, model, answers


@asynccontextmanager
async def running_engine(socket: Path) -> AsyncIterator[tuple[EngineClient, Description]]:
    """The engine of this home and what it says of itself. Raises ``EngineUnavailable``."""
    from fortpoint.engine.client import EngineClient

    engine = EngineClient(socket)
    try:
        try:
            description = await engine.describe()
        except EngineUnavailable:
            raise EngineUnavailable(
                f"no server runs on {socket.parent.parent}; start it with `fortpoint serve`"
            ) from None
        yield engine, description
    finally:
        await engine.close()


async def _record(
    state: Path, model: Description, wish: Wish, strengths: Sequence[float | None]
) -> None:
    """What is asked for, before it is: the guard does not stand in this way."""
    from fortpoint.audit.entry import Content, Inside, commitment, new_salt
    from fortpoint.cli import record

    given = ", ".join("none" if one is None else f"{one:g}" for one in strengths)
    detail = f"{wish.mode} {wish.target}, scope {wish.scope}, strengths {given}"
    salt = new_salt()
    async with record.opened(state) as (_, log):
        await record.append(
            log,
            "cli steer",
            detail,
            model=model.model,
            model_digest=model.digest,
            content=Content(salt),
            request_sha256=commitment(salt, wish.prompt.encode(errors="replace")),
            inside=Inside(steers=sum(one is not None for one in strengths)),
        )


def request_of(wish: Wish, strength: float | None, number: int) -> Generate:
    """In the engine's terms."""
    from fortpoint.engine.protocol import Generate, Sampling, Steer
    from fortpoint.types import Message, Role

    change = None
    if strength is not None:
        change = msgspec.convert(
            {
                "mode": wish.mode,
                "target": wish.target,
                "strength": strength,
                "scope": wish.scope,
            },
            Steer,
        )
    return Generate(
        f"steer-{number}",
        Sampling(wish.max_tokens, wish.temperature, seed=wish.seed),
        messages=(Message(Role.USER, wish.prompt),),
        read=False,
        hold=False,
        tenant="cli",
        steer=() if change is None else (change,),
    )


async def _answer(
    engine: EngineClient,
    wish: Wish,
    strength: float | None,
    number: int,
    show: Callable[[str], None],
) -> Steered:
    """One answer; what broke it off is told in it, unless nothing came at all of the only one."""
    from fortpoint.engine.protocol import Finished, Token

    text, reason, n_tokens, problem = "", None, 0, None
    try:
        async with await engine.generate(request_of(wish, strength, number)) as stream:
            async for event in stream:
                if isinstance(event, Token):
                    n_tokens += 1
                    piece = printable(event.text)
                    text += piece
                    show(piece)
                elif isinstance(event, Finished):
                    reason = event.reason
    except FortPointError as error:
        problem = error.message
    return Steered(
        strength=strength, text=text, finish_reason=reason, tokens=n_tokens, error=problem
    )


def printable(text: str) -> str:
    """A model may write anything: no escape sequence may reach the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def print_beside(target: str, mode: str, answers: Sequence[Steered]) -> None:
    """A column for each answer; more than three are rows."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    titles = [_title(target, mode, answer.strength) for answer in answers]
    cells = [Text(answer.error or answer.text, overflow="fold") for answer in answers]
    if len(answers) <= _MAX_COLUMNS:
        table = Table(*titles)
        for column in table.columns:
            column.ratio = 1
        table.add_row(*cells)
    else:
        table = Table("steering", "answer", show_lines=True)
        table.columns[0].no_wrap = True
        for title, cell in zip(titles, cells, strict=True):
            table.add_row(Text(title), cell)
    Console().print(table)


def _title(target: str, mode: str, strength: float | None) -> str:
    if strength is None:
        return "unsteered"
    return f"{target} ablated" if mode == "ablate" else f"{target} {mode} {strength:g}"


def _say_found(found: Found) -> None:
    """Which feature words were taken for. Names are the operator's own, labels may be anybody's."""
    if found.label is not None:
        typer.echo(f"{found.target}: {printable(found.label)}", err=True)
    if found.others:
        typer.echo(f"others: {printable('; '.join(found.others))}", err=True)


def _print_piece(piece: str) -> None:
    typer.echo(piece, nl=False)


def _quiet(piece: str) -> None:
    """Answers that are shown together are shown at their end."""


def _print_json(found: Found, model: Description, wish: Wish, answers: Sequence[Steered]) -> None:
    printed = {
        "model": model.model,
        "digest": model.digest,
        "target": found.target,
        "label": found.label,
        "mode": wish.mode,
        "scope": wish.scope,
        "prompt": wish.prompt,
        "answers": answers,
    }
    typer.echo(msgspec.json.encode(printed).decode())
