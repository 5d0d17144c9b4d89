"""The BPF program itself, run by a small interpreter for both architectures."""

from __future__ import annotations

import errno
import os
import socket
import struct

import pytest

from fortpoint.hardening.profiles import ENGINE, GATEWAY, GATEWAY_OUTBOUND, Profile
from fortpoint.hardening.seccomp import Instruction, assemble
from fortpoint.hardening.syscall_numbers import NEWEST_KNOWN, NUMBERS

ALLOW = 0x7FFF0000
KILL = 0x80000000
EPERM = 0x00050000 | errno.EPERM
ENOSYS = 0x00050000 | errno.ENOSYS
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # include/uapi/linux/audit.h
CLONE_OF_PTHREAD_CREATE = 0x3D0F00
SIGCHLD = 17
MACHINES = sorted(ARCH)


def interpret(program: list[Instruction], data: bytes) -> int:
    """Classic BPF (Documentation/networking/filter.rst), the instructions that we use."""
    accumulator, at = 0, 0
    while True:
        code, jt, jf, k = program[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif code == 0x54:
            accumulator &= k
        elif code == 0x15:
            at += jt if accumulator == k else jf
        elif code == 0x25:
            at += jt if accumulator > k else jf
        elif code == 0x45:
            at += jt if accumulator & k else jf
        elif code == 0x06:
            return k
        else:
            raise AssertionError(hex(code))


def ask(
    profile: Profile, machine: str, call: str | int, *arguments: int, arch: int | None = None
) -> int:
    number = NUMBERS[machine][call] if isinstance(call, str) else call
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number, arch or ARCH[machine], 0, *padded)
    return interpret(assemble(profile.rules(), machine), data)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("profile", [ENGINE, GATEWAY, GATEWAY_OUTBOUND], ids=lambda p: p.name)
class TestEveryProfile:
    def test_program_fits_the_kernel_and_its_jumps_land(
        self, profile: Profile, machine: str
    ) -> None:
        program = assemble(profile.rules(), machine)
        assert len(program) <= 4096  # BPF_MAXINSNS
        for at, line in enumerate(program):
            assert 0 <= line.jt <= 255
            assert 0 <= line.jf <= 255
            assert at + 1 + max(line.jt, line.jf) <= len(program)

    def test_rules_name_only_calls_that_some_architecture_has(
        self, profile: Profile, machine: str
    ) -> None:
        del machine
        known = {name for table in NUMBERS.values() for name in table}
        assert {rule.name for rule in profile.rules()} <= known

    def test_other_architecture_is_killed(self, profile: Profile, machine: str) -> None:
        other = {"x86_64": 0x40000003, "aarch64": 0x40000028}[machine]  # i386, 32-bit arm
        assert ask(profile, machine, 1, arch=other) == KILL

    @pytest.mark.parametrize("call", ["execve", "execveat", "unshare", "bind", "memfd_create"])
    def test_call_on_the_list_is_refused(self, profile: Profile, machine: str, call: str) -> None:
        assert ask(profile, machine, call) == EPERM

    @pytest.mark.parametrize("call", ["ptrace", "process_vm_readv", "bpf", "setns", "kexec_load"])
    def test_call_of_no_honest_code_kills(self, profile: Profile, machine: str, call: str) -> None:
        assert ask(profile, machine, call) == KILL

    def test_thread_is_allowed_and_process_refused(self, profile: Profile, machine: str) -> None:
        assert ask(profile, machine, "clone", CLONE_OF_PTHREAD_CREATE) == ALLOW
        assert ask(profile, machine, "clone", SIGCHLD) == EPERM
        assert ask(profile, machine, "clone", CLONE_OF_PTHREAD_CREATE | 0x40000000) == EPERM
        assert ask(profile, machine, "clone3") == ENOSYS

    def test_signals_reach_only_itself(self, profile: Profile, machine: str) -> None:
        assert ask(profile, machine, "kill", os.getpid(), 15) == ALLOW
        assert ask(profile, machine, "kill", os.getppid(), 15) == EPERM
        assert ask(profile, machine, "kill", 0xFFFFFFFF, 15) == EPERM  # -1: everybody
        assert ask(profile, machine, "tgkill", os.getppid(), 1, 15) == EPERM

    def test_terminal_cannot_be_typed_into(self, profile: Profile, machine: str) -> None:
        assert ask(profile, machine, "ioctl", 0, 0x5412) == EPERM
        assert ask(profile, machine, "ioctl", 0, 0x100005412) == EPERM  # high word is ignored
        assert ask(profile, machine, "ioctl", 0, 0x5413) == ALLOW

    def test_dumpable_cannot_be_undone(self, profile: Profile, machine: str) -> None:
        assert ask(profile, machine, "prctl", 4, 1) == EPERM
        assert ask(profile, machine, "prctl", 3) == ALLOW

    def test_newer_calls_do_not_exist(self, profile: Profile, machine: str) -> None:
        assert ask(profile, machine, NEWEST_KNOWN) == ALLOW
        assert ask(profile, machine, NEWEST_KNOWN + 1) == ENOSYS


def test_x32_table_of_x86_64_is_killed() -> None:
    assert ask(ENGINE, "x86_64", 0x40000000 | NUMBERS["x86_64"]["socket"]) == KILL


@pytest.mark.parametrize("machine", MACHINES)
def test_socket_by_profile_and_family(machine: str) -> None:
    inet, unix = int(socket.AF_INET), int(socket.AF_UNIX)
    stream, datagram = int(socket.SOCK_STREAM), int(socket.SOCK_DGRAM)
    nonblocking = 0o2004000  # SOCK_NONBLOCK | SOCK_CLOEXEC on Linux
    assert ask(ENGINE, machine, "socket", unix, stream) == EPERM
    assert ask(GATEWAY, machine, "socket", unix, stream | nonblocking) == ALLOW
    assert ask(GATEWAY, machine, "socket", unix, datagram) == EPERM
    assert ask(GATEWAY, machine, "socket", inet, stream) == EPERM
    assert ask(GATEWAY_OUTBOUND, machine, "socket", inet, stream) == ALLOW
    assert ask(GATEWAY_OUTBOUND, machine, "socket", 40, stream) == EPERM


@pytest.mark.parametrize("machine", MACHINES)
def test_mode_by_profile_and_bits(machine: str) -> None:
    assert ask(ENGINE, machine, "fchmod", 3, 0o600) == EPERM
    assert ask(GATEWAY, machine, "fchmod", 3, 0o600) == ALLOW
    assert ask(GATEWAY, machine, "fchmod", 3, 0o640) == EPERM
    assert ask(GATEWAY, machine, "fchmodat", 3, 0, 0o700) == ALLOW
    assert ask(GATEWAY, machine, "fchmodat", 3, 0, 0o701) == EPERM


@pytest.mark.parametrize("machine", MACHINES)
def test_numbers_are_unique_and_not_newer_than_the_bound(machine: str) -> None:
    numbers = list(NUMBERS[machine].values())
    assert len(set(numbers)) == len(numbers)
    assert max(numbers) <= NEWEST_KNOWN
