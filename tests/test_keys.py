"""Keys: what is accepted, what is refused, and that no refusal says why."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import select, update

from fortpoint.access import keys as keys_module
from fortpoint.access.keys import KeyRing
from fortpoint.errors import InvalidRequest, NotFound, Unauthenticated
from fortpoint.store import tables
from fortpoint.store.database import Database

HOSTILE = [
    "'; DROP TABLE keys; --",
    "' OR '1'='1",
    '"; DELETE FROM keys; --',
    "%_%",
    "a\\'b",
    "{user}",
    ":user",
    "?1",
    "Robert'); DROP TABLE audit_entries;--",
]


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database.in_home(tmp_path / "home")
    await database.migrate()
    yield database
    await database.close()


@pytest.fixture
def keyring(database: Database) -> KeyRing:
    return KeyRing(database)


async def test_key_created_authenticates_as_its_user_and_role(keyring: KeyRing) -> None:
    assert await keyring.is_empty()
    new = await keyring.create("Ada Łovelace", "operator")
    assert len(new.secret) == 6 + 12 + 1 + 43
    assert new.secret.startswith(f"sk-fp-{new.key_id}-")
    principal = await keyring.authenticate(new.secret)
    assert (principal.key_id, principal.user, principal.role) == (
        new.key_id,
        "Ada Łovelace",
        "operator",
    )
    assert not await keyring.is_empty()


async def test_secret_never_stored_listed_or_shown(
    keyring: KeyRing, database: Database, tmp_path: Path
) -> None:
    new = await keyring.create("ada", "customer")
    secret = new.secret.rpartition(new.key_id + "-")[2]
    await database.close()
    for file in (tmp_path / "home").iterdir():
        assert secret.encode() not in file.read_bytes()
    assert secret not in repr(new)
    assert secret not in str(new)
    assert secret not in repr(await keyring.list())


@pytest.mark.parametrize(
    "token",
    [
        "",
        "sk-fp-",
        "Bearer sk-fp-aaaaaaaaaaaa-" + "A" * 43,
        "sk-fp-aaaaaaaaaaaa-" + "A" * 42,
        "sk-fp-aaaaaaaaaaaa-" + "A" * 44,
        "sk-fp-aaaaaaaaaaaa-" + "A" * 42 + "\n",
        "sk-fp-aaaaaaaaaaaa-" + "A" * 42 + "=",
        "sk-fp-AAAAAAAAAAAA-" + "A" * 43,
        "sk-fp-aaaaaaaaaaaa_" + "A" * 43,
        "sk-fp-aaaaaaaaaaaa-" + "\N{FULLWIDTH LATIN CAPITAL LETTER A}" * 43,
        "sk-fp-aaaaaaaaaaaa-" + "\ud800" * 43,
        "sk-fp-aaaaaaaaaaaa-" + "\0" * 43,
        "sk-fp-" + "٣" * 12 + "-" + "A" * 43,
        "sk-fp-' OR 1=1 -- -" + "A" * 43,
        "sk-fp-%%%%%%%%%%%%-" + "A" * 43,
        "x" * 10_000_000,
    ],
)
async def test_token_of_a_wrong_shape_refused_without_a_query(
    keyring: KeyRing, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    async def unexpected(key_id: str) -> None:
        raise AssertionError("the database was asked")

    monkeypatch.setattr(keyring, "_row", unexpected)
    with pytest.raises(Unauthenticated):
        await keyring.authenticate(token)


async def test_refusal_message_the_same_for_every_reason(
    keyring: KeyRing, database: Database
) -> None:
    good = await keyring.create("ada", "customer")
    revoked = await keyring.create("ada", "customer")
    await keyring.revoke(revoked.key_id)
    expired = await keyring.create("ada", "customer", datetime.now(UTC) + timedelta(days=1))
    await _expire(database, expired.key_id)
    wrong = f"sk-fp-{good.key_id}-{secrets.token_urlsafe(32)}"
    unknown = f"sk-fp-{'a' * 12}-{secrets.token_urlsafe(32)}"
    messages = set()
    for token in ("nonsense", wrong, unknown, revoked.secret, expired.secret):
        with pytest.raises(Unauthenticated) as caught:
            await keyring.authenticate(token)
        messages.add(caught.value.message)
    assert len(messages) == 1
    await keyring.authenticate(good.secret)


async def test_last_character_of_the_secret_changed_is_refused(keyring: KeyRing) -> None:
    # 43 base64 characters hold 258 bits: the last one's spare bits must not be ignored.
    new = await keyring.create("ada", "customer")
    for last in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_":
        token = new.secret[:-1] + last
        if token != new.secret:
            with pytest.raises(Unauthenticated):
                await keyring.authenticate(token)


async def test_comparison_constant_time_also_for_an_unknown_id(
    keyring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[int, int]] = []

    def recording(stored: bytes, given: bytes) -> bool:
        compared.append((len(stored), len(given)))
        return hmac.compare_digest(stored, given)

    class Recording:
        compare_digest = staticmethod(recording)

    monkeypatch.setattr(keys_module, "hmac", Recording)
    new = await keyring.create("ada", "customer")
    await keyring.authenticate(new.secret)
    for token in (
        f"sk-fp-{new.key_id}-{secrets.token_urlsafe(32)}",
        f"sk-fp-{'a' * 12}-{secrets.token_urlsafe(32)}",
    ):
        with pytest.raises(Unauthenticated):
            await keyring.authenticate(token)
    assert compared == [(32, 32)] * 3


async def test_key_revoked_refused_at_once_by_another_process_too(
    keyring: KeyRing, tmp_path: Path
) -> None:
    new = await keyring.create("ada", "customer")
    other = Database.in_home(tmp_path / "home")
    elsewhere = KeyRing(other)
    await elsewhere.authenticate(new.secret)
    await keyring.revoke(new.key_id)
    for ring in (keyring, elsewhere):
        with pytest.raises(Unauthenticated):
            await ring.authenticate(new.secret)
    await other.close()


async def test_key_revoked_twice_keeps_the_first_time(keyring: KeyRing) -> None:
    new = await keyring.create("ada", "customer")
    await keyring.revoke(new.key_id)
    first = (await keyring.list())[0].revoked_at
    await keyring.revoke(new.key_id)
    assert first is not None
    assert first.tzinfo is not None
    assert (await keyring.list())[0].revoked_at == first


@pytest.mark.parametrize("key_id", ["a" * 12, "", "\ud800", "x" * 5000, *HOSTILE])
async def test_revoke_of_an_unknown_id_is_not_found(keyring: KeyRing, key_id: str) -> None:
    kept = await keyring.create("ada", "customer")
    with pytest.raises(NotFound):
        await keyring.revoke(key_id)
    await keyring.authenticate(kept.secret)


async def test_key_expired_refused(keyring: KeyRing, database: Database) -> None:
    new = await keyring.create("ada", "customer", datetime.now(UTC) + timedelta(hours=1))
    await keyring.authenticate(new.secret)
    await _expire(database, new.key_id)
    with pytest.raises(Unauthenticated):
        await keyring.authenticate(new.secret)


async def test_expiry_in_another_zone_is_the_same_moment(keyring: KeyRing) -> None:
    moment = datetime.now(timezone(timedelta(hours=9))) + timedelta(hours=1)
    await keyring.create("ada", "customer", moment)
    assert (await keyring.list())[0].expires_at == moment


@pytest.mark.parametrize(
    "expires_at",
    [datetime(2099, 1, 1), datetime(2001, 1, 1, tzinfo=UTC)],
    ids=["naive", "past"],
)
async def test_expiry_naive_or_past_refused(keyring: KeyRing, expires_at: datetime) -> None:
    with pytest.raises(InvalidRequest):
        await keyring.create("ada", "customer", expires_at)
    assert await keyring.is_empty()


@pytest.mark.parametrize(
    "user",
    ["", " ", " ada", "ada ", "a\0b", "a\nb", "a\x1b[31mb", "a\u202eb", "\ud800", "x" * 129],
)
async def test_user_name_unprintable_or_too_long_refused(keyring: KeyRing, user: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await keyring.create(user, "customer")
    assert caught.value.param == "user"
    assert await keyring.is_empty()


@pytest.mark.parametrize("user", HOSTILE)
async def test_user_name_with_sql_kept_as_text(keyring: KeyRing, user: str) -> None:
    new = await keyring.create(user, "customer")
    assert (await keyring.authenticate(new.secret)).user == user
    assert [record.user for record in await keyring.list()] == [user]


@pytest.mark.parametrize("role", ["admin", "", "customer'; --", "CUSTOMER"])
async def test_role_unknown_refused(keyring: KeyRing, role: str) -> None:
    with pytest.raises(InvalidRequest):
        await keyring.create("ada", role)  # type: ignore[arg-type]


async def test_list_gives_keys_oldest_first(keyring: KeyRing, database: Database) -> None:
    made = [(await keyring.create(f"user {n}", "customer")).key_id for n in range(5)]
    assert [record.key_id for record in await keyring.list()] == made
    async with database.connect() as connection:
        hashes = (await connection.execute(select(tables.keys.c.secret_sha256))).scalars().all()
    assert len(set(hashes)) == 5


async def _expire(database: Database, key_id: str) -> None:
    async with database.begin() as connection:
        await connection.execute(
            update(tables.keys)
            .where(tables.keys.c.key_id == key_id)
            .values(expires_at=datetime.now(UTC) - timedelta(seconds=1))
        )
