"""What a process can give up by itself: capabilities, core dumps, being traced.

The order inside ``harden_process`` is not free: capabilities first, because the bounding set
needs ``CAP_SETPCAP``; "dumpable" and the death signal last, because a change of credentials
resets both.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal

from fortpoint.errors import SandboxError
from fortpoint.hardening import kernel

_CAPABILITY_VERSION_3 = 0x20080522
_MAX_CAPABILITY = 63  # two 32-bit words in version 3


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilityWord(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def harden_process(parent_pid: int | None = None) -> bool:
    """Give up core dumps, being traced, new privileges and every capability; for good.

    ``parent_pid`` is the process that must be the parent: this one is killed when it dies
    (strictly: when the *thread* that started this process ends). Call it while one thread
    exists. Returns False where only the core limit exists (not Linux). Raises
    ``SandboxError`` when a step fails or the parent is another.

    A root user keeps uid 0 but loses the power to pass file permissions, so what the process
    needs must belong to its own uid. Not stopped: another process that does hold
    ``CAP_SYS_PTRACE``.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not kernel.LINUX:
        return False
    kernel.check_single_thread("dropping capabilities")
    _drop_capabilities()
    kernel.checked(kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1), "no_new_privs")
    # The core limit is not applied to dumps piped to a program (core(5)); this is.
    kernel.checked(kernel.prctl(kernel.PR_SET_DUMPABLE, 0), "turning off dumps and tracing")
    if parent_pid is not None:
        _die_with_parent(parent_pid)
    return True


def has_no_capabilities() -> bool:
    """Whether none is held, and none can be gained by running a file."""
    words = _read_capabilities()
    if words is None or any(w.effective or w.permitted or w.inheritable for w in words):
        return False
    return kernel.prctl(kernel.PR_GET_NO_NEW_PRIVS) == 1 or not any(
        kernel.prctl(kernel.PR_CAPBSET_READ, number) == 1 for number in range(_MAX_CAPABILITY + 1)
    )


def _drop_capabilities() -> None:
    for number in range(_MAX_CAPABILITY + 1):
        if kernel.prctl(kernel.PR_CAPBSET_READ, number) == 1:
            # Refused to those without CAP_SETPCAP; no_new_privs then stands in for it.
            kernel.prctl(kernel.PR_CAPBSET_DROP, number)
    kernel.prctl(kernel.PR_CAP_AMBIENT, kernel.PR_CAP_AMBIENT_CLEAR_ALL)
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    empty = (_CapabilityWord * 2)()
    if kernel.libc().capset(ctypes.byref(header), ctypes.byref(empty)) != 0:
        raise SandboxError(f"dropping capabilities failed: {os.strerror(ctypes.get_errno())}")


def _read_capabilities() -> list[_CapabilityWord] | None:
    if not kernel.LINUX:
        return None
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    words = (_CapabilityWord * 2)()
    if kernel.libc().capget(ctypes.byref(header), ctypes.byref(words)) != 0:
        return None
    return list(words)


def _die_with_parent(parent_pid: int) -> None:
    kernel.checked(
        kernel.prctl(kernel.PR_SET_PDEATHSIG, int(signal.SIGKILL)), "binding to the parent's life"
    )
    # The parent may have died before the signal was set; then nobody would ever send it.
    if os.getppid() != parent_pid:
        raise SandboxError("the process that started this one is gone")
