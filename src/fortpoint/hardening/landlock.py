"""Landlock: the process can open the listed paths and nothing else of the file system.

Rights that the kernel knows are all taken away, then given back beneath the listed paths. On
newer kernels TCP (ABI 4), device ioctls (5), abstract Unix sockets and signals to processes
outside (6) go too. Threads that exist already are not bound by it, so it refuses to run when
there are any.

Not protected: descriptors opened before; names and sizes (``stat``), ``chmod``, ``chown``,
extended attributes and UDP, which Landlock does not cover and seccomp does (``profiles``).
Source: Documentation/userspace-api/landlock.rst, include/uapi/linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable, Sequence
from enum import IntFlag
from pathlib import Path

from fortpoint.errors import SandboxError
from fortpoint.hardening import kernel

_CREATE_RULESET = 444  # the same numbers on every architecture
_ADD_RULE = 445
_RESTRICT_SELF = 446
_QUERY_VERSION = 1
_RULE_PATH_BENEATH = 1
_RULE_NET_PORT = 2
_CONNECT_TCP = 0b10


class Access(IntFlag):
    """Rights to files, by the kernel's names."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


_READ = Access.READ_FILE | Access.READ_DIR
_WRITE = (
    _READ
    | Access.WRITE_FILE
    | Access.TRUNCATE
    | Access.MAKE_REG
    | Access.MAKE_DIR
    | Access.REMOVE_FILE
    | Access.REMOVE_DIR
)
_FILE_ONLY = Access.READ_FILE | Access.WRITE_FILE | Access.TRUNCATE
_BIND_AND_CONNECT_TCP = 0b11
_SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11


class _RulesetAttr(ctypes.Structure):
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),  # since ABI 4
        ("scoped", ctypes.c_uint64),  # since ABI 6
    )


class _PathBeneathAttr(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


class _NetPortAttr(ctypes.Structure):
    _fields_ = (("allowed_access", ctypes.c_uint64), ("port", ctypes.c_uint64))


def landlock_abi() -> int:
    """The kernel's Landlock version; 0 where there is none or it is switched off."""
    if not kernel.LINUX:
        return 0
    return max(0, kernel.syscall(_CREATE_RULESET, None, 0, _QUERY_VERSION))


def confine_files(
    read: Sequence[Path],
    write: Sequence[Path] = (),
    *,
    tcp: bool = False,
    connect: Sequence[int] = (),
    signals: bool = False,
) -> bool:
    """From now on only ``read`` can be read and only ``write`` changed, with all beneath them.

    A path may be a folder or a file; one that does not exist is left out (it stays closed,
    also when it is made later). ``write`` allows reading, making and removing regular files
    and folders, never sockets, links or devices; nothing may be executed. ``tcp`` leaves TCP
    as it is, ``connect`` leaves connections to these TCP ports, ``signals`` leaves signals to
    outside processes. Returns False where the kernel has no Landlock. Raises ``SandboxError``
    when more than one thread exists or the kernel refuses a rule. Called again, it narrows
    further and never widens.
    """
    abi = landlock_abi()
    if abi == 0:
        return False
    kernel.check_single_thread("confining files")
    handled = _handled(abi)
    ruleset = _create_ruleset(abi, handled, tcp=tcp, signals=signals)
    try:
        _allow(ruleset, read, _READ & handled)
        _allow(ruleset, write, _WRITE & handled)
        if abi >= 4 and not tcp:
            _allow_ports(ruleset, connect)
        kernel.checked(kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1), "no_new_privs")
        kernel.checked(kernel.syscall(_RESTRICT_SELF, ruleset, 0), "confining files")
    finally:
        os.close(ruleset)
    return True


def _handled(abi: int) -> Access:
    """Every file right this ABI knows. A right that is not handled would stay open."""
    handled = Access((1 << 13) - 1)
    if abi >= 2:
        handled |= Access.REFER
    if abi >= 3:
        handled |= Access.TRUNCATE
    if abi >= 5:
        handled |= Access.IOCTL_DEV
    return handled


def _create_ruleset(abi: int, handled: Access, *, tcp: bool, signals: bool) -> int:
    attr = _RulesetAttr(handled_access_fs=int(handled))
    if abi >= 4 and not tcp:
        attr.handled_access_net = _BIND_AND_CONNECT_TCP
    if abi >= 6:
        attr.scoped = 0b01 if signals else _SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS
    # Older kernels accept the longer struct as long as the fields they lack are zero.
    number = kernel.syscall(_CREATE_RULESET, ctypes.byref(attr), ctypes.sizeof(attr), 0)
    return kernel.checked(number, "making the file rules")


def _allow(ruleset: int, paths: Iterable[Path], access: Access) -> None:
    for path in paths:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise SandboxError(
                f"cannot open {path.name!r} for its rule: {error.strerror}"
            ) from None
        try:
            _allow_descriptor(ruleset, descriptor, access, path)
        finally:
            os.close(descriptor)


def _allow_ports(ruleset: int, ports: Iterable[int]) -> None:
    for port in ports:
        rule = _NetPortAttr(allowed_access=_CONNECT_TCP, port=port)
        result = kernel.syscall(_ADD_RULE, ruleset, _RULE_NET_PORT, ctypes.byref(rule), 0)
        kernel.checked(result, f"allowing port {port}")


def _allow_descriptor(ruleset: int, descriptor: int, access: Access, path: Path) -> None:
    if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
        access &= _FILE_ONLY
    rule = _PathBeneathAttr(allowed_access=int(access), parent_fd=descriptor)
    result = kernel.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    kernel.checked(result, f"allowing {path.name!r}")
