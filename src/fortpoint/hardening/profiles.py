"""Which system calls a kind of process must never make, and their numbers.

It is a list of what is refused, not of what is allowed: torch, glibc and the interpreter
change what they call with each release, and a forgotten call would stop the product on
somebody's machine. What the list forgets is bounded from above: a call newer than
``syscall_numbers.NEWEST_KNOWN`` does not exist for the process (``ENOSYS``).

Not protected: what is sent over descriptors that the process holds (a filter cannot look
into ``sendmsg``, so descriptors can still be passed to a peer it already has), and arguments
behind pointers, such as the address in ``connect``.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

_CLONE_THREAD = 0x00010000
_CLONE_NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, UTS, IPC, USER, PID, NET
_PRCTL_UNDOING = (1, 4, 0x59616D61)  # PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_PTRACER
_TIOCSTI = 0x5412  # types into the terminal
_TIOCLINUX = 0x541C  # the same, on a console


class Answer(Enum):
    """What the caller of a refused system call gets."""

    KILL = "kill"  # no honest code makes it: end the process
    EPERM = errno.EPERM
    ENOSYS = errno.ENOSYS  # the C library then falls back to an older call


@dataclass(frozen=True, slots=True)
class Match:
    """``argument & mask == value`` on the low 32 bits of one argument."""

    argument: int
    value: int
    mask: int = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Rule:
    """One refused call. It is let through only when ``unless`` is not empty and all of it
    matches; with ``when``, it is refused only if that matches."""

    name: str
    answer: Answer = Answer.EPERM
    unless: tuple[Match, ...] = ()
    when: Match | None = None


@dataclass(frozen=True, slots=True)
class Profile:
    """A kind of process. ``rules`` is called in it, so that rules can name its own pid."""

    name: str
    rules: Callable[[], tuple[Rule, ...]]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_KILL = _words(
    "ptrace process_vm_readv process_vm_writev pidfd_getfd bpf open_by_handle_at "
    "init_module finit_module delete_module kexec_load kexec_file_load reboot "
    "mount umount2 pivot_root move_mount mount_setattr setns swapon swapoff "
    "iopl ioperm uselib"
)
_ALWAYS = _words(
    # programs and processes
    "execve execveat fork vfork unshare personality pidfd_open pidfd_send_signal "
    "rt_sigqueueinfo rt_tgsigqueueinfo tkill process_madvise process_mrelease kcmp "
    # file systems and handles to files by number
    "chroot open_tree fsopen fsconfig fsmount fspick name_to_handle_at fanotify_init quotactl "
    "quotactl_fd acct "
    # sockets: those that exist already may listen and accept
    "bind "
    # kernel surface without use here
    "perf_event_open userfaultfd add_key request_key keyctl modify_ldt "
    "memfd_create memfd_secret syslog vmsplice lookup_dcookie nfsservctl ustat sysfs "
    "settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname vhangup "
    "migrate_pages move_pages "
    # ways to share memory and messages that Landlock does not see
    "shmget shmat shmctl semget semop semctl semtimedop msgget msgsnd msgrcv msgctl mq_open "
    # owners and attributes, which Landlock does not see either
    "chown fchown lchown fchownat setxattr lsetxattr fsetxattr removexattr lremovexattr "
    "fremovexattr"
)
_ENOSYS = _words("clone3 io_uring_setup io_uring_enter io_uring_register")
# Sockets to the kernel itself, to hosts of virtual machines, to radios: PF_KEY, netlink, packet,
# RDS, CAN, TIPC, Bluetooth, ALG, NFC, vsock, QRTR, SMC, XDP.
_ODD_FAMILIES = (15, 16, 17, 21, 29, 30, 31, 38, 39, 40, 42, 43, 44)
_MODE_ARGUMENT = {"chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2}


def _common() -> tuple[Rule, ...]:
    own_pid = os.getpid()
    return (
        *(Rule(name, Answer.KILL) for name in _KILL),
        *(Rule(name) for name in _ALWAYS),
        *(Rule(name, Answer.ENOSYS) for name in _ENOSYS),
        Rule("clone", unless=(Match(0, _CLONE_THREAD, _CLONE_THREAD | _CLONE_NEW_NAMESPACES),)),
        Rule("kill", unless=(Match(0, own_pid),)),
        Rule("tgkill", unless=(Match(0, own_pid),)),
        Rule("prlimit64", unless=(Match(0, 0),)),
        # What harden_process set must stay set.
        *(Rule("prctl", when=Match(0, option)) for option in _PRCTL_UNDOING),
        Rule("ioctl", when=Match(1, _TIOCSTI)),
        Rule("ioctl", when=Match(1, _TIOCLINUX)),
        # asyncio's self-pipe. Datagram pairs could be pointed at any socket file.
        Rule("socketpair", unless=(Match(0, socket.AF_UNIX), Match(1, socket.SOCK_STREAM, 0xF))),
    )


def _engine() -> tuple[Rule, ...]:
    closed = ("socket", "connect", *_MODE_ARGUMENT)
    return (*_common(), *(Rule(name) for name in closed))


def _gateway() -> tuple[Rule, ...]:
    unix_stream = (Match(0, socket.AF_UNIX), Match(1, socket.SOCK_STREAM, 0xF))
    return (*_gateway_outbound(), Rule("socket", unless=unix_stream))


def _gateway_outbound() -> tuple[Rule, ...]:
    private = (
        Rule(name, unless=(Match(argument, 0, 0o077),)) for name, argument in _MODE_ARGUMENT.items()
    )
    return (*_common(), *private, *(Rule("socket", when=Match(0, n)) for n in _ODD_FAMILIES))


ENGINE = Profile("engine", _engine)
"""No socket can be made or connected; the listening one that exists keeps accepting."""

GATEWAY = Profile("gateway", _gateway)
"""Only Unix stream sockets can be made (to reach the engine); files only made private."""

GATEWAY_OUTBOUND = Profile("gateway-outbound", _gateway_outbound)
"""As ``GATEWAY``, but may open connections: for PostgreSQL, Valkey or an upstream engine."""
