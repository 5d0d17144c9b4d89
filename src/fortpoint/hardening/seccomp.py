"""Seccomp: the kernel refuses listed system calls, to every thread, for good.

The filter is a classic BPF program over ``struct seccomp_data``. It first ends a process that
calls through another architecture's table (``int 0x80``, x32), because the numbers there mean
other calls and would pass any list. Speculation mitigations that come with seccomp stay on.
Source: Documentation/userspace-api/seccomp_filter.rst, include/uapi/linux/{seccomp,filter}.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fortpoint.errors import SandboxError
from fortpoint.hardening import kernel
from fortpoint.hardening.profiles import Answer, Match, Profile, Rule
from fortpoint.hardening.syscall_numbers import NEWEST_KNOWN, NUMBERS

_SECCOMP_NUMBER = {"x86_64": 317, "aarch64": 277}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SET_MODE_FILTER = 1
_GET_ACTION_AVAIL = 2
_FLAG_TSYNC = 1
_X32_BIT = 0x40000000

_RET_KILL_PROCESS = 0x80000000
_RET_ERRNO = 0x00050000
_RET_ALLOW = 0x7FFF0000

_OFFSET_NUMBER = 0
_OFFSET_ARCH = 4
_OFFSET_ARGUMENTS = 16  # 64 bits each; the low word first on little-endian machines

_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_GREATER = 0x25
_JUMP_SET = 0x45
_RETURN = 0x06  # BPF_RET | BPF_K


class Instruction(NamedTuple):
    """``struct sock_filter``. ``jt``, ``jf``: instructions skipped when true, when false."""

    code: int
    jt: int
    jf: int
    k: int


class _SockFilter(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.POINTER(_SockFilter)))


def seccomp_available() -> bool:
    """Whether this kernel filters system calls on an architecture whose numbers we know."""
    number = _SECCOMP_NUMBER.get(kernel.machine())
    if not kernel.LINUX or number is None:
        return False
    action = ctypes.c_uint32(_RET_KILL_PROCESS)
    return kernel.syscall(number, _GET_ACTION_AVAIL, 0, ctypes.byref(action)) == 0


def forbid_syscalls(profile: Profile) -> bool:
    """Install the profile's filter in all threads. Filters add up and cannot be removed.

    Returns False where there is no seccomp or the architecture is neither x86_64 nor
    aarch64. Raises ``SandboxError`` when the kernel refuses the filter.
    """
    if not seccomp_available():
        return False
    machine = kernel.machine()
    program = assemble(profile.rules(), machine)
    instructions = (_SockFilter * len(program))(*(_SockFilter(*line) for line in program))
    fprog = _SockFprog(len(program), instructions)
    kernel.checked(kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1), "no_new_privs")
    result = kernel.checked(
        kernel.syscall(
            _SECCOMP_NUMBER[machine], _SET_MODE_FILTER, _FLAG_TSYNC, ctypes.byref(fprog)
        ),
        "forbidding system calls",
    )
    if result > 0:  # the id of a thread that already runs under another filter
        raise SandboxError("forbidding system calls failed: one thread could not be bound")
    return True


def assemble(rules: Iterable[Rule], machine: str) -> list[Instruction]:
    """The program for one architecture. Calls that it does not have are left out.

    Each rule is a block that is skipped when the number differs, so that no jump exceeds
    BPF's 255 instructions.
    """
    numbers = NUMBERS[machine]
    program = [
        Instruction(_LOAD, 0, 0, _OFFSET_ARCH),
        Instruction(_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        Instruction(_RETURN, 0, 0, _RET_KILL_PROCESS),
        Instruction(_LOAD, 0, 0, _OFFSET_NUMBER),
    ]
    if machine == "x86_64":
        program += [
            Instruction(_JUMP_SET, 0, 1, _X32_BIT),
            Instruction(_RETURN, 0, 0, _RET_KILL_PROCESS),
        ]
    program += [
        Instruction(_JUMP_GREATER, 0, 1, NEWEST_KNOWN),
        Instruction(_RETURN, 0, 0, _returned(Answer.ENOSYS)),
    ]
    for rule in rules:
        if (number := numbers.get(rule.name)) is not None:
            body = _body(rule)
            program += [Instruction(_JUMP_EQUAL, 0, len(body), number), *body]
    return [*program, Instruction(_RETURN, 0, 0, _RET_ALLOW)]


def _body(rule: Rule) -> list[Instruction]:
    """What happens once the number is the rule's. Falls through to the next rule or returns."""
    refuse = Instruction(_RETURN, 0, 0, _returned(rule.answer))
    reload = Instruction(_LOAD, 0, 0, _OFFSET_NUMBER)
    if rule.when is not None:
        *load, compare = _compare(rule.when)
        return [*load, compare._replace(jt=0, jf=1), refuse, reload]
    return _unless(rule.unless, refuse)


def _unless(matches: Sequence[Match], refuse: Instruction) -> list[Instruction]:
    """Refuse unless every match holds. A failed comparison jumps to the last instruction."""
    if not matches:
        return [refuse]
    lines = [line for match in matches for line in _compare(match)]
    lines.append(Instruction(_RETURN, 0, 0, _RET_ALLOW))
    aimed = [
        line._replace(jf=len(lines) - 1 - at) if line.code == _JUMP_EQUAL else line
        for at, line in enumerate(lines)
    ]
    return [*aimed, refuse]


def _compare(match: Match) -> list[Instruction]:
    return [
        Instruction(_LOAD, 0, 0, _OFFSET_ARGUMENTS + 8 * match.argument),
        Instruction(_AND, 0, 0, match.mask),
        Instruction(_JUMP_EQUAL, 0, 0, match.value),
    ]


def _returned(answer: Answer) -> int:
    if answer is Answer.KILL:
        return _RET_KILL_PROCESS
    return _RET_ERRNO | int(answer.value)
