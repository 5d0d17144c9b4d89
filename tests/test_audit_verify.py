"""Verification: an untouched log passes; whatever is done to one, the first bad entry is named.

Every damage is also shown to the stand-alone script, which shares no code with the product.
"""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from fortpoint.audit.checkpoint import Signer
from fortpoint.audit.entry import Entry, encode, now, seal
from fortpoint.audit.log import AuditLog
from fortpoint.audit.merkle import Frontier, Node, leaf_hash
from fortpoint.audit.signing_key import load_or_create, load_public
from fortpoint.audit.verify import Report, verify
from fortpoint.errors import VerificationError
from fortpoint.store.database import Database

SCRIPT = Path(__file__).parent.parent / "scripts" / "verify_audit.py"
BATCHES = (1, 1, 1, 7, 1, 9)  # 20 entries; 3 to 9 and 11 to 19 share a checkpoint
SIZE = sum(BATCHES)


def entry(number: int) -> Entry:
    return Entry(
        time=now(), kind="answer", request_id=f"req_{number}", surface="/v1/chat", status=200
    )


def grow(database: sqlite3.Connection, signer: Signer, before: Frontier, n: int) -> Frontier:
    """What ``AuditLog`` commits for one batch, without a running loop."""
    after, nodes = before, list[Node]()
    for index in range(before.size, before.size + n):
        data = seal(encode(entry(index)), index)
        leaf = leaf_hash(data)
        after = after.grow([leaf], nodes)
        database.execute("INSERT INTO audit_entries VALUES (?, ?, ?)", (index, leaf, data))
    rows = [(node.height, node.number, node.hash) for node in nodes]
    database.executemany("INSERT INTO audit_nodes VALUES (?, ?, ?)", rows)
    database.execute(
        "INSERT INTO audit_checkpoints VALUES (?, ?, ?, ?)",
        (
            after.size,
            after.root(),
            after.to_bytes(),
            signer.sign_checkpoint(after.size, after.root()),
        ),
    )
    database.commit()
    return after


async def _new_home(home: Path) -> Signer:
    database = Database.in_home(home)
    await database.migrate()
    await (await AuditLog.open(database, home)).close()
    await database.close()
    return load_or_create(home, may_create=False)


@pytest.fixture
async def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    signer = await _new_home(home)
    with Connected(home) as database:
        frontier = Frontier()
        for n in BATCHES:
            frontier = grow(database, signer, frontier, n)
    return home


class Connected:
    """The home's database, written as an attacker would."""

    def __init__(self, home: Path) -> None:
        self._connection = sqlite3.connect(home / "fortpoint.db")

    def __enter__(self) -> sqlite3.Connection:
        return self._connection

    def __exit__(self, *_: object) -> None:
        self._connection.commit()
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._connection.close()


def verified(home: Path) -> Report:
    return verify(home / "fortpoint.db", load_public(home))


def refusal(home: Path) -> VerificationError:
    with pytest.raises(VerificationError) as caught:
        verified(home)
    assert "\n" not in caught.value.message
    script = run_script(home)
    assert script.returncode == 1
    assert script.stderr.startswith("NOT VERIFIED: ")
    assert "Traceback" not in script.stderr
    return caught.value


def run_script(home: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "log", str(home / "fortpoint.db")]
    command += ["--key", str(home / "keys" / "audit.pub"), *extra]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_log_untouched_verifies(home: Path) -> None:
    report = verified(home)
    assert (report.entries, report.checkpoints) == (SIZE, len(BATCHES))
    assert report.origin == load_public(home).name
    script = run_script(home)
    assert (script.returncode, script.stderr) == (0, "")
    assert script.stdout == f"verified: {SIZE} entries of {report.origin}\n"


async def test_log_without_entries_verifies(tmp_path: Path) -> None:
    await _new_home(tmp_path / "empty")
    assert verified(tmp_path / "empty").entries == 0
    assert run_script(tmp_path / "empty").returncode == 0


def test_script_imports_only_the_standard_library() -> None:
    imported = re.findall(r"^(?:import|from) ([a-z0-9_]+)", SCRIPT.read_text(), re.MULTILINE)
    assert set(imported) <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("index", [0, 5, 10, SIZE - 1])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_byte_flipped_in_an_entry_names_it(home: Path, index: int, where: float) -> None:
    with Connected(home) as database:
        (data,) = database.execute(
            'SELECT entry FROM audit_entries WHERE "index" = ?', (index,)
        ).fetchone()
        changed = bytearray(data)
        changed[int(where * (len(data) - 1))] ^= 1
        database.execute(
            'UPDATE audit_entries SET entry = ? WHERE "index" = ?', (bytes(changed), index)
        )
    error = refusal(home)
    assert error.param == f"entries[{index}]"
    assert error.message.startswith(f"entry {index} ")
    assert "was changed: its hash does not match" in error.message
    assert f"entry {index} " in run_script(home).stderr


def test_byte_flipped_in_the_file_names_the_entry_its_time_and_request(home: Path) -> None:
    path = home / "fortpoint.db"
    data = path.read_bytes()
    at = data.index(b'"status":200', data.index(b'"request_id":"req_7"'))
    path.write_bytes(data[: at + 9] + b"4" + data[at + 10 :])
    message = refusal(home).message
    assert re.fullmatch(
        r"entry 7 \(\d{4}-\d\d-\d\dT[\d:.]+Z, request id req_7\) was changed: "
        r"its hash does not match",
        message,
    )


def _sql(*statements: str) -> Callable[[Path], None]:
    def damage(home: Path) -> None:
        with Connected(home) as database:
            for statement in statements:
                database.execute(statement)

    return damage


def _swap(home: Path) -> None:
    _sql(
        'UPDATE audit_entries SET "index" = -1 WHERE "index" = 5',
        'UPDATE audit_entries SET "index" = 5 WHERE "index" = 6',
        'UPDATE audit_entries SET "index" = 6 WHERE "index" = -1',
    )(home)


def _renumber(home: Path) -> None:
    """Entry 5 removed and every later one moved up, as if it had never been."""
    _sql(
        'DELETE FROM audit_entries WHERE "index" = 5',
        'UPDATE audit_entries SET "index" = -"index" WHERE "index" > 5',
        'UPDATE audit_entries SET "index" = -"index" - 1 WHERE "index" < 0',
    )(home)


def _rewrite(index: int) -> Callable[[Path], None]:
    """An entry and its leaf hash replaced together, consistently."""

    def damage(home: Path) -> None:
        data = seal(encode(entry(666)), index)
        with Connected(home) as database:
            database.execute(
                'UPDATE audit_entries SET entry = ?, leaf_hash = ? WHERE "index" = ?',
                (data, leaf_hash(data), index),
            )

    return damage


def _append_unsigned(home: Path) -> None:
    data = seal(encode(entry(SIZE)), SIZE)
    with Connected(home) as database:
        database.execute(
            "INSERT INTO audit_entries VALUES (?, ?, ?)", (SIZE, leaf_hash(data), data)
        )


DAMAGES: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "first entry removed": (_sql('DELETE FROM audit_entries WHERE "index" = 0'), 0, "is missing"),
    "middle entry removed": (_sql('DELETE FROM audit_entries WHERE "index" = 5'), 5, "is missing"),
    "last entry removed": (
        _sql('DELETE FROM audit_entries WHERE "index" = 19'),
        19,
        "the log ends after 19",
    ),
    "tail cut": (_sql('DELETE FROM audit_entries WHERE "index" >= 12'), 12, "covers 20 entries"),
    "all entries removed": (_sql("DELETE FROM audit_entries"), 0, "is missing"),
    "entries swapped": (_swap, 5, "its bytes are those of entry 6"),
    "entry removed and the rest renumbered": (_renumber, 5, "its bytes are those of entry 6"),
    "leaf hash changed": (
        _sql('UPDATE audit_entries SET leaf_hash = zeroblob(32) WHERE "index" = 8'),
        8,
        "its hash does not match",
    ),
    "leaf hash of another type": (
        _sql('UPDATE audit_entries SET leaf_hash = 7 WHERE "index" = 8'),
        8,
        "its hash does not match",
    ),
    "entry of another type": (
        _sql('UPDATE audit_entries SET entry = 3.5 WHERE "index" = 8'),
        8,
        "its hash does not match",
    ),
    "entry a planted monster": (
        _sql('UPDATE audit_entries SET entry = zeroblob(20000000) WHERE "index" = 8'),
        8,
        "too large",
    ),
    "negative index added": (
        _sql("INSERT INTO audit_entries VALUES (-1, zeroblob(32), zeroblob(3))"),
        0,
        "the next one is entry -1",
    ),
    "entry rewritten under its own checkpoint": (_rewrite(2), 2, "entry 2 is not as recorded"),
    "entry rewritten within a batch": (_rewrite(6), 3, "entries 3 to 9"),
    "entry added without a checkpoint": (_append_unsigned, 20, "under no checkpoint"),
    "newest checkpoint removed": (
        _sql("DELETE FROM audit_checkpoints WHERE size = 20"),
        11,
        "under no checkpoint",
    ),
    "all checkpoints removed": (_sql("DELETE FROM audit_checkpoints"), 0, "under no checkpoint"),
    "checkpoint's note changed": (
        _sql(
            "UPDATE audit_checkpoints SET note = CAST(replace(CAST(note AS TEXT), '11', '12')"
            " AS BLOB) WHERE size = 11"
        ),
        10,
        "checkpoint over entry 10 was changed",
    ),
    "checkpoint's note not UTF-8": (
        _sql("UPDATE audit_checkpoints SET note = CAST(x'ff0a0aff0a' AS TEXT) WHERE size = 11"),
        10,
        "checkpoint over entry 10 was changed",
    ),
    "checkpoint's note empty": (
        _sql("UPDATE audit_checkpoints SET note = '' WHERE size = 11"),
        10,
        "checkpoint over entry 10 was changed",
    ),
    "checkpoint's note that of another": (
        _sql(
            "UPDATE audit_checkpoints SET note ="
            " (SELECT note FROM audit_checkpoints WHERE size = 10) WHERE size = 11"
        ),
        10,
        "does not say what was signed",
    ),
    "checkpoint's root changed": (
        _sql("UPDATE audit_checkpoints SET root_hash = zeroblob(32) WHERE size = 11"),
        10,
        "does not say what was signed",
    ),
    "checkpoint's size raised beyond the log": (
        _sql("UPDATE audit_checkpoints SET size = 21 WHERE size = 20"),
        20,
        "covers 21 entries",
    ),
    "checkpoint's size negative": (
        _sql("UPDATE audit_checkpoints SET size = -4 WHERE size = 11"),
        0,
        "impossible size",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_log_damaged_is_refused_and_the_first_bad_entry_named(home: Path, name: str) -> None:
    damage, index, words = DAMAGES[name]
    damage(home)
    error = refusal(home)
    assert words in error.message
    assert error.param == f"entries[{index}]"


def test_frontier_changed_is_refused(home: Path) -> None:
    # The stand-alone script does not read this column: it is only how the log resumes.
    _sql("UPDATE audit_checkpoints SET frontier = zeroblob(64) WHERE size = 20")(home)
    with pytest.raises(VerificationError, match="frontier"):
        verified(home)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE audit_nodes SET hash = zeroblob(32) WHERE number = 1",
        "DELETE FROM audit_nodes WHERE number = 1",
        "INSERT INTO audit_nodes VALUES (8, 77, zeroblob(32))",
    ],
)
async def test_node_changed_is_refused_and_the_entries_are_said_to_be_sound(
    tmp_path: Path, damage: str
) -> None:
    home = tmp_path / "long"
    await _long_home(home, 1100)
    assert verified(home).entries == 1100
    _sql(damage)(home)
    with pytest.raises(VerificationError, match="proofs are wrong"):
        verified(home)
    assert run_script(home).returncode == 0


async def test_log_signed_anew_by_another_key_is_refused(home: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    signer = await _new_home(other)
    with Connected(other) as database:
        grow(database, signer, Frontier(), SIZE)
    shutil.copy(other / "fortpoint.db", home / "fortpoint.db")
    assert "no signature by the log's key" in refusal(home).message


def test_two_bad_entries_name_the_first(home: Path) -> None:
    _sql("UPDATE audit_entries SET entry = x'00' WHERE \"index\" IN (16, 4)")(home)
    assert refusal(home).param == "entries[4]"


def test_control_characters_in_a_changed_entry_do_not_reach_the_terminal(home: Path) -> None:
    with Connected(home) as database:
        database.execute(
            'UPDATE audit_entries SET entry = ? WHERE "index" = 3',
            (b'{"entry":{"request_id":"\x1b[2J\xff\n","time":"\xe2\x80\xae"}}',),
        )
    message = refusal(home).message
    assert message.startswith("entry 3 (")
    assert message.isprintable()
    assert "\x1b" not in run_script(home).stderr


# ---- the file itself ----


async def _long_home(home: Path, entries: int = 2000) -> bytes:
    signer = await _new_home(home)
    with Connected(home) as database:
        frontier = Frontier()
        for _ in range(entries // 100):
            frontier = grow(database, signer, frontier, 100)
    return (home / "fortpoint.db").read_bytes()


async def test_pages_overwritten_are_a_clear_line_with_the_last_good_entry(tmp_path: Path) -> None:
    home = tmp_path / "long"
    data = await _long_home(home)
    page = data.index(b'"request_id":"req_1000"') // 4096 * 4096
    (home / "fortpoint.db").write_bytes(data[:page] + b"\xff" * 4096 + data[page + 4096 :])
    error = refusal(home)
    assert re.search(
        r"the last good entry is entry 9\d\d \(.*request id req_9\d\d\)", error.message
    )
    assert "cannot be read" in error.message or "is missing" in error.message


async def test_any_page_overwritten_is_refused_or_harmless(tmp_path: Path) -> None:
    home = tmp_path / "long"
    data = await _long_home(home, 300)
    path = home / "fortpoint.db"
    refused = 0
    for page in range(0, len(data), 4096):
        for filling in (b"\x00", b"\xff", b"\x0d"):
            path.write_bytes(data[:page] + filling * 4096 + data[page + 4096 :])
            try:
                entries = verified(home).entries
            except VerificationError:
                refused += 1
            else:
                assert entries == 300  # a page of another table
    assert refused > len(data) // 4096


async def test_file_cut_short_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "long"
    data = await _long_home(home)
    for length in (0, 50, 100, 4096, len(data) // 2, len(data) - 4096):
        (home / "fortpoint.db").write_bytes(data[:length])
        refusal(home)


@pytest.mark.parametrize("content", [b"", b"this is not a database" * 300])
def test_file_that_is_not_a_database_is_refused(home: Path, content: bytes) -> None:
    (home / "fortpoint.db").write_bytes(content)
    assert "database file cannot be read" in refusal(home).message


def test_file_missing_is_refused_and_not_made(home: Path) -> None:
    key = load_public(home)
    (home / "fortpoint.db").unlink()
    with pytest.raises(VerificationError, match="there is no log"):
        verify(home / "fortpoint.db", key)
    assert not (home / "fortpoint.db").exists()


def test_name_with_uri_characters_is_read_as_a_name(home: Path) -> None:
    strange = home / "a?mode=rwc&b#c %41.db"
    shutil.copy(home / "fortpoint.db", strange)
    assert verify(strange, load_public(home)).entries == SIZE


async def test_verify_beside_a_live_writer_sees_whole_batches(tmp_path: Path) -> None:
    home = tmp_path / "home"
    signer = await _new_home(home)
    stop = threading.Event()

    def write() -> None:
        database = sqlite3.connect(home / "fortpoint.db")
        frontier = Frontier()
        while not stop.is_set():
            frontier = grow(database, signer, frontier, 5)
        database.close()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        sizes = [verified(home).entries]
        deadline = time.monotonic() + 30
        while len(sizes) < 20 or (len(set(sizes)) < 3 and time.monotonic() < deadline):
            sizes.append(verified(home).entries)
    finally:
        stop.set()
        writer.join()
    assert sizes == sorted(sizes)
    assert all(size % 5 == 0 for size in sizes)
    assert sizes[-1] > 0


def test_verify_leaves_the_file_as_it_was(home: Path) -> None:
    before = (home / "fortpoint.db").read_bytes()
    verified(home)
    assert (home / "fortpoint.db").read_bytes() == before


def test_copy_that_may_only_be_read_verifies(home: Path, tmp_path: Path) -> None:
    """Another user, in a folder it may not write: SQLite cannot make its WAL index there."""
    copy = tmp_path / "copy"
    copy.mkdir(mode=0o755)
    shutil.copy(home / "fortpoint.db", copy)
    (copy / "fortpoint.db").chmod(0o444)
    copy.chmod(0o555)
    try:
        assert verify(copy / "fortpoint.db", load_public(home)).entries == SIZE
    finally:
        copy.chmod(0o755)


async def test_memory_stays_flat_however_long_the_log_is(tmp_path: Path) -> None:
    peaks = []
    for entries in (500, 5000):
        home = tmp_path / str(entries)
        await _long_home(home, entries)
        tracemalloc.start()
        assert verified(home).entries == entries
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 256 * 1024
