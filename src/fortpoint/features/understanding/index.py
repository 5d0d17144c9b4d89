"""What is known of a dictionary's features, in one file beside it.

    features/<dictionary>/understanding.jsonl.gz

The first line is the ``Header``. Then come blocks of 1,024 features, each of as many lines as
the header names fields: a line is one field of all of the block's features, which packs a fifth
smaller than a line a feature would. It is read within limits, and every number has its range: an
index may come from others.

    index = Index.load(folder, n_features=4608)
    index.features[417].label, index.features[417].contexts[0].tokens

Not protected here: whether the index is true. Its ``digest`` says for which weights it was made.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import Meta

from fortpoint.errors import ModelError, NotFound, StorageError
from fortpoint.features.sae import MAX_FEATURES
from fortpoint.vault.model_folder import sha256_of

FILE = "understanding.jsonl.gz"
VERSION = 2
MAX_FILE_BYTES = 256 * 1024 * 1024
MAX_TEXT_BYTES = 2 * 1024 * 1024 * 1024
MAX_LINE_BYTES = 32 * 1024 * 1024
BLOCK = 1024
_CHUNK = 1 << 20

Number = Annotated[int, Meta(ge=0, le=MAX_FEATURES)]
Share = Annotated[float, Meta(ge=0, le=1)]
Text = Annotated[str, Meta(max_length=512)]


class Term(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One term of a rule; ``kind`` and ``value`` as ``terms.name`` writes them."""

    kind: Annotated[str, Meta(max_length=32)]
    value: Text
    weight: Annotated[float, Meta(ge=0, le=1000)]


class Rule(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Active where the weights of the terms that hold, and ``bias``, add up to more than 0."""

    bias: Annotated[float, Meta(ge=-1000, le=1000)]
    terms: Annotated[tuple[Term, ...], Meta(max_length=64)]


class Context(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Tokens and their strengths in hundredths of the feature's maximum; ``peak`` is the place
    of the token that was chosen. ``level`` 0 are the strongest, 1 and on the lesser."""

    tokens: Annotated[tuple[Text, ...], Meta(min_length=1, max_length=128)]
    strengths: Annotated[tuple[Annotated[int, Meta(ge=0, le=100)], ...], Meta(max_length=128)]
    peak: Annotated[int, Meta(ge=0, le=127)]
    level: Annotated[int, Meta(ge=0, le=9)]


class Effect(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A token and how much its logit changes."""

    token: Text
    logit: float


class Keyword(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A word and at how many hundredths of a feature's strongest tokens it is in sight: at the
    token, or among the eight before."""

    word: Annotated[str, Meta(max_length=64)]
    share: Annotated[int, Meta(ge=0, le=100)]


class Kin(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Another feature and how close it is, in hundredths."""

    index: Number
    closeness: Annotated[int, Meta(ge=-100, le=100)]


class Feature(msgspec.Struct, frozen=True):
    """All of one feature.

    ``label_score`` is the label's balanced accuracy on unseen text, None where the feature was
    active too rarely to tell. ``labeller`` is empty for labels made from contrasts, else the
    model that wrote it. ``frequency`` is the share of tokens on which it is active; 0 is dead.
    ``histogram`` counts active tokens in equal bins up to ``max_activation``. ``x`` and ``y``
    are its place on the map, 0 to 1000.
    """

    index: Number
    label: Text
    label_score: Share | None
    labeller: Annotated[str, Meta(max_length=128)]
    rule: Rule | None
    frequency: Share
    max_activation: Annotated[float, Meta(ge=0)]
    histogram: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=64)]
    contexts: Annotated[tuple[Context, ...], Meta(max_length=64)]
    promoted: Annotated[tuple[Effect, ...], Meta(max_length=64)]
    suppressed: Annotated[tuple[Effect, ...], Meta(max_length=64)]
    neighbours: Annotated[tuple[Kin, ...], Meta(max_length=64)]
    encoder_neighbours: Annotated[tuple[Kin, ...], Meta(max_length=64)]
    coactive: Annotated[tuple[Kin, ...], Meta(max_length=64)]
    cluster: Annotated[int, Meta(ge=-1, le=MAX_FEATURES)]
    x: Annotated[int, Meta(ge=0, le=1000)]
    y: Annotated[int, Meta(ge=0, le=1000)]
    keywords: Annotated[tuple[Keyword, ...], Meta(max_length=64)] = ()


class Cluster(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A group of like features and its place on the map."""

    name: Text
    size: Number
    x: Annotated[int, Meta(ge=0, le=1000)]
    y: Annotated[int, Meta(ge=0, le=1000)]


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``digest`` is the SHA-256 of the dictionary's weights. Scores are means over features that
    could be judged: on ``mean_score_random`` the inactive tokens are random ones alone."""

    version: int
    dictionary: Annotated[str, Meta(max_length=128)]
    model: Annotated[str, Meta(max_length=128)]
    model_digest: Annotated[str, Meta(max_length=128)]
    digest: Annotated[str, Meta(max_length=128)]
    layer: Annotated[int, Meta(ge=0, le=4096)]
    n_features: Number
    n_tokens: Annotated[int, Meta(ge=0)]
    n_held_out_tokens: Annotated[int, Meta(ge=0)]
    n_dead: Number
    n_judged: Number
    mean_score: Share | None
    mean_score_random: Share | None
    clusters: Annotated[tuple[Cluster, ...], Meta(max_length=4096)]
    classes: Annotated[tuple[Text, ...], Meta(max_length=4096)]
    class_of_token: bytes
    fields: tuple[str, ...] = Feature.__struct_fields__


@dataclass(frozen=True, eq=False)
class Index:
    """``features[i]`` is feature ``i`` of the dictionary."""

    header: Header
    features: tuple[Feature, ...]

    @classmethod
    def load(cls, folder: Path, n_features: int | None = None) -> Index:
        """Of the dictionary in ``folder``. Raises ``NotFound`` where there is none,
        ``ModelError`` for one that is malformed or of another size."""
        path = folder / FILE
        if not path.is_file():
            raise NotFound(
                f"{folder.name} has no index; make one with "
                f"`fortpoint features describe {folder.name} --harvest FOLDER`"
            )
        index = cls.read(path)
        if n_features is not None and index.header.n_features != n_features:
            raise ModelError(
                f"{path.name} of {folder.name} describes {index.header.n_features} features, "
                f"the dictionary has {n_features}; describe it again"
            )
        return index

    @classmethod
    def read(cls, path: Path) -> Index:
        """Raises ``ModelError``."""
        lines = _lines(path)
        try:
            header = msgspec.json.decode(next(lines, b""), type=Header)
            features = tuple(_features(header, lines))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
            raise ModelError(f"{path.name} is no index of features") from None
        _check(path, header, features)
        return cls(header, features)

    def save(self, folder: Path) -> Path:
        """Beside the dictionary, whole or not at all. Raises ``StorageError``."""
        path = folder / FILE
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_bytes(self.packed())
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise StorageError(
                f"cannot write {path.name} to {folder.name}: {error.strerror or error}"
            ) from None
        return path

    def packed(self) -> bytes:
        """The file's bytes; the same for the same index."""
        encoder = msgspec.json.Encoder()
        packed = io.BytesIO()
        with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=9, mtime=0) as file:
            file.write(encoder.encode(self.header) + b"\n")
            for start in range(0, len(self.features), BLOCK):
                block = self.features[start : start + BLOCK]
                for name in self.header.fields:
                    file.write(encoder.encode([getattr(f, name) for f in block]) + b"\n")
        return packed.getvalue()

    def with_features(self, features: tuple[Feature, ...]) -> Index:
        """The same with other features; the header's figures are counted again."""
        scores = [f.label_score for f in features if f.label_score is not None]
        header = msgspec.structs.replace(
            self.header,
            n_judged=len(scores),
            mean_score=round(sum(scores) / len(scores), 4) if scores else None,
        )
        return replace(self, header=header, features=features)


def plain(value: Any) -> Any:
    """A struct of this module as objects and lists, its fields named."""
    if isinstance(value, msgspec.Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    return [plain(one) for one in value] if isinstance(value, tuple) else value


def digest_of(weights: Path) -> str:
    """How a header names a dictionary's weights."""
    return "sha256:" + sha256_of(weights)


def _features(header: Header, lines: Iterator[bytes]) -> Iterator[Feature]:
    """Raises ``ValueError`` for a block whose lines are too few or do not go together."""
    if not _readable(header):
        return
    types = get_type_hints(Feature, include_extras=True)
    decoders = [_column(types[name]) for name in header.fields]
    for _ in range(0, header.n_features, BLOCK):
        columns = [decoder.decode(next(lines, b"")) for decoder in decoders]
        for values in zip(*columns, strict=True):
            yield Feature(**dict(zip(header.fields, values, strict=True)))
    if next(lines, None) is not None:
        raise ValueError("more lines than features")


def _readable(header: Header) -> bool:
    """Its fields may be fewer where the others have defaults."""
    fields = msgspec.structs.fields(Feature)
    needed = {field.name for field in fields if field.default is msgspec.NODEFAULT}
    given = set(header.fields)
    known = needed <= given <= set(Feature.__struct_fields__)
    return header.version == VERSION and known and len(given) == len(header.fields)


def _column(kind: Any) -> msgspec.json.Decoder[list[Any]]:
    return msgspec.json.Decoder(list[kind])


def _check(path: Path, header: Header, features: tuple[Feature, ...]) -> None:
    """What the types do not say."""
    if not _readable(header):
        raise ModelError(
            f"{path.name} is of version {header.version}, not {VERSION}; describe it again"
        )
    n = header.n_features
    if len(features) != n or any(feature.index != i for i, feature in enumerate(features)):
        raise ModelError(f"{path.name} does not have the features 0 to {n - 1} in order")
    for feature in features:
        kin = (*feature.neighbours, *feature.encoder_neighbours, *feature.coactive)
        if any(other.index >= n for other in kin):
            raise ModelError(f"{path.name}: feature {feature.index} names one that is not there")
        if feature.cluster >= len(header.clusters):
            raise ModelError(f"{path.name}: feature {feature.index} is in a cluster of no name")
        for context in feature.contexts:
            if not len(context.strengths) == len(context.tokens) > context.peak:
                raise ModelError(f"{path.name}: a context of feature {feature.index} is torn")


def _lines(path: Path) -> Iterator[bytes]:
    """Unpacked piece by piece, so that a small file cannot become a large one in memory."""
    unpack = zlib.decompressobj(wbits=31)
    n_bytes, rest = 0, b""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ModelError(f"{path.name} is larger than {MAX_FILE_BYTES} bytes")
        with path.open("rb") as file:
            while not unpack.eof:
                piece = unpack.unconsumed_tail or file.read(_CHUNK)
                text = unpack.decompress(piece, _CHUNK) if piece else unpack.flush()
                n_bytes += len(text)
                *lines, rest = (rest + text).split(b"\n")
                if n_bytes > MAX_TEXT_BYTES or len(rest) > MAX_LINE_BYTES:
                    raise ModelError(f"{path.name} unpacks to too much")
                yield from lines
                if not piece:
                    break
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror}") from None
    except zlib.error:
        raise ModelError(f"{path.name} is damaged") from None
    if rest or not unpack.eof:
        raise ModelError(f"{path.name} is cut off")
