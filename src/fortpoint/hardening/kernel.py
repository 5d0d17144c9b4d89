"""The few Linux calls that Python's standard library does not offer, by ``ctypes``.

A call that fails returns a negative ``errno``, as the kernel itself does, so that the caller
decides what absence means. Nothing here decides a policy.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache
from pathlib import Path

from fortpoint.errors import SandboxError

LINUX = sys.platform.startswith("linux")

# include/uapi/linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_GET_DUMPABLE = 3
PR_SET_DUMPABLE = 4
PR_GET_SECCOMP = 21
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4


@cache
def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def machine() -> str:
    """``x86_64`` or ``aarch64`` where the system call numbers are known, else another name.

    A 32-bit Python on a 64-bit kernel makes other calls than its kernel's name says.
    """
    name = {"amd64": "x86_64", "arm64": "aarch64"}.get(
        platform.machine().lower(), platform.machine().lower()
    )
    return name if ctypes.sizeof(ctypes.c_void_p) == 8 else f"{name} (32-bit)"


def prctl(option: int, argument: int = 0) -> int:
    """``prctl(2)`` with the unused arguments zero; ``-errno`` on failure."""
    if not LINUX:
        return -1
    longs = [ctypes.c_ulong(value) for value in (argument, 0, 0, 0)]
    result = int(libc().prctl(ctypes.c_int(option), *longs))
    return result if result >= 0 else -ctypes.get_errno()


def syscall(number: int, *arguments: object) -> int:
    """A raw system call; ``-errno`` on failure. Integers are passed as C longs."""
    function = libc().syscall
    function.restype = ctypes.c_long
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = int(function(ctypes.c_long(number), *wide))
    return result if result >= 0 else -ctypes.get_errno()


def checked(result: int, what: str) -> int:
    """The result of a call that must succeed. Raises ``SandboxError``."""
    if result < 0:
        raise SandboxError(f"{what} failed: {os.strerror(-result)}")
    return result


def thread_count() -> int:
    """Threads of this process, those that C libraries started included."""
    return len(list(Path("/proc/self/task").iterdir()))


def check_single_thread(what: str) -> None:
    """Raise ``SandboxError`` when threads exist that ``what`` would not reach."""
    try:
        n_threads = thread_count()
    except OSError:
        raise SandboxError(f"{what} needs /proc to see that no thread escapes it") from None
    if n_threads != 1:
        raise SandboxError(
            f"{what} binds only the calling thread, and {n_threads} exist already; "
            "call it before torch, numpy or any thread is started"
        )
