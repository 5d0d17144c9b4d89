"""Saved steering: what is kept, whose keys have it, and what cannot be lost unnoticed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fortpoint.access.keys import KeyRing
from fortpoint.access.presets import Assigned, Preset, PresetBook
from fortpoint.errors import AuditUnavailable, InvalidRequest, NotFound
from fortpoint.store.database import Database


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database.in_home(tmp_path)
    await database.migrate()
    yield database
    await database.close()


@pytest.fixture
def book(database: Database) -> PresetBook:
    return PresetBook(database)


@pytest.fixture
async def key(database: Database) -> str:
    return (await KeyRing(database).create("ada", "customer")).key_id


def preset(name: str = "golden-gate-6", steers: bytes = b"[1]") -> Preset:
    return Preset(name, "tiny", steers, datetime(2030, 1, 2, tzinfo=UTC), "os:grace")


async def test_preset_that_was_saved_comes_back_as_it_was(book: PresetBook) -> None:
    await book.save(preset())
    assert await book.named("golden-gate-6") == preset()
    assert await book.list() == (Assigned(preset()),)
    assert await book.named("other") is None


async def test_preset_of_the_same_name_is_replaced_and_keeps_its_keys(
    book: PresetBook, key: str
) -> None:
    await book.save(preset())
    await book.assign("golden-gate-6", key, always=True)
    await book.save(preset(steers=b"[2]"))
    found = await book.default_of(key)
    assert found is not None
    assert found.steers == b"[2]"
    assert found.sha256 != preset().sha256


async def test_digest_differs_with_the_model_and_the_steers() -> None:
    one = preset()
    other = Preset(one.name, "tin", b"y\n[1]", one.saved_at, one.saved_by)
    assert len({one.sha256, other.sha256, preset(steers=b"[2]").sha256}) == 3


async def test_key_has_only_what_it_was_given(book: PresetBook, key: str) -> None:
    await book.save(preset())
    await book.save(preset("calm"))
    assert await book.granted(key, "calm") is None
    await book.assign("calm", key, always=False)
    assert await book.granted(key, "calm") == preset("calm")
    assert await book.granted(key, "golden-gate-6") is None
    assert await book.default_of(key) is None
    assert await book.names_of(key) == ("calm",)


async def test_default_is_one_and_the_earlier_one_is_named(book: PresetBook, key: str) -> None:
    await book.save(preset())
    await book.save(preset("calm"))
    assert await book.assign("golden-gate-6", key, always=True) is None
    assert await book.assign("golden-gate-6", key, always=True) is None
    assert await book.assign("calm", key, always=True) == "golden-gate-6"
    assert await book.default_of(key) == preset("calm")
    listed = {one.preset.name: one for one in await book.list()}
    assert listed["calm"] == Assigned(preset("calm"), (key,), (key,))
    assert listed["golden-gate-6"] == Assigned(preset(), (key,), ())


async def test_preset_that_is_a_default_is_not_removed_until_it_is_taken(
    book: PresetBook, key: str
) -> None:
    await book.save(preset())
    await book.assign("golden-gate-6", key, always=True)
    with pytest.raises(InvalidRequest, match=key):
        await book.remove("golden-gate-6")
    assert await book.default_of(key) == preset()
    await book.unassign("golden-gate-6", key)
    assert await book.default_of(key) is None
    await book.remove("golden-gate-6")
    assert await book.list() == ()


async def test_preset_of_a_dead_key_is_removed(database: Database, book: PresetBook) -> None:
    ring = KeyRing(database)
    soon = datetime.now(UTC) + timedelta(seconds=0.2)
    revoked, expired = await ring.create("a", "customer"), await ring.create("b", "customer", soon)
    await ring.revoke(revoked.key_id)
    await book.save(preset(), default_of=[revoked.key_id, expired.key_id])
    with pytest.raises(InvalidRequest, match=expired.key_id):
        await book.remove("golden-gate-6")
    while datetime.now(UTC) <= soon:
        pass
    await book.remove("golden-gate-6")
    assert await book.named("golden-gate-6") is None


async def test_lists_of_keys_replace_those_it_had_and_others_stay(
    database: Database, book: PresetBook, key: str
) -> None:
    other = (await KeyRing(database).create("b", "operator")).key_id
    await book.save(preset(), keys_of=[key], default_of=[key])
    await book.save(preset(), keys_of=[other, other])
    assert await book.list() == (Assigned(preset(), (other,), (key,)),)
    await book.save(preset(), default_of=[])
    assert await book.list() == (Assigned(preset(), (other,), ()),)


@pytest.mark.parametrize("key_id", ["a" * 12, "nope", "' OR 1=1 --", ""])
async def test_key_that_there_is_not_gets_nothing_and_nothing_is_saved(
    book: PresetBook, key_id: str
) -> None:
    with pytest.raises(NotFound, match="no key"):
        await book.save(preset(), keys_of=[key_id])
    assert await book.list() == ()
    await book.save(preset())
    with pytest.raises(NotFound):
        await book.assign("golden-gate-6", key_id, always=True)
    with pytest.raises(NotFound):
        await book.unassign("golden-gate-6", key_id)


@pytest.mark.parametrize("name", ["", ".x", "a b", "a/b", "x" * 65, "a\n", "é"])
async def test_name_that_is_none_is_refused(book: PresetBook, name: str) -> None:
    with pytest.raises(InvalidRequest):
        await book.save(preset(name))
    with pytest.raises(NotFound):
        await book.remove(name)


async def test_change_that_cannot_be_recorded_is_undone(book: PresetBook, key: str) -> None:
    async def change_and_fail() -> None:
        async with book.kept_if_recorded("golden-gate-6"):
            await book.save(preset(steers=b"[9]"), keys_of=[key], default_of=[key])
            raise AuditUnavailable("the disk is full")

    with pytest.raises(AuditUnavailable):
        await change_and_fail()
    assert await book.list() == ()
    await book.save(preset(), keys_of=[key])
    with pytest.raises(AuditUnavailable):
        await change_and_fail()
    assert await book.list() == (Assigned(preset(), (key,), ()),)


async def test_removal_that_cannot_be_recorded_is_undone(book: PresetBook, key: str) -> None:
    await book.save(preset(), keys_of=[key])

    async def remove_and_fail() -> None:
        async with book.kept_if_recorded("golden-gate-6"):
            await book.remove("golden-gate-6")
            raise AuditUnavailable("the disk is full")

    with pytest.raises(AuditUnavailable):
        await remove_and_fail()
    assert await book.list() == (Assigned(preset(), (key,), ()),)
