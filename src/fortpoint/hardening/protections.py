"""What is really on, measured in the running process.

Each protection is tried where that is harmless, so that a container's own filter or a file
mode is not taken for ours. Nothing here relies on ``/proc``, which the process may have lost.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import socket
import stat
from collections.abc import Collection, Iterable, Iterator

from fortpoint.errors import SandboxError
from fortpoint.hardening import kernel
from fortpoint.hardening.process import has_no_capabilities

_MODE_FILTER = 2
_REFUSED = (errno.EPERM, errno.EACCES)
_MAX_DESCRIPTORS = 65536

REQUIRED = (
    "landlock",
    "seccomp",
    "no_new_privileges",
    "not_dumpable",
    "no_core_dumps",
    "no_capabilities",
    "no_network",
)
"""What an engine with ``engine.sandbox = "require"`` must have."""


def protections() -> dict[str, bool]:
    """Name to on or off, for ``Description.protections`` and ``fortpoint doctor``.

    ``landlock``           the root folder, which anybody may list, is refused
    ``seccomp``            a filter is on, and running a program is refused by it
    ``no_new_privileges``  setuid programs give nothing
    ``not_dumpable``       others of the same user cannot trace it or read its memory
    ``no_core_dumps``      neither to a file nor to a crash handler
    ``no_capabilities``    also if the user is root
    ``no_outbound``        no internet socket can be made
    ``no_network``         that, and none was inherited (a gateway holds one by design)
    """
    dumpable = kernel.prctl(kernel.PR_GET_DUMPABLE)
    no_outbound = _socket_refused(socket.AF_INET) and _socket_refused(socket.AF_INET6)
    return {
        "landlock": _root_folder_refused(),
        "seccomp": kernel.prctl(kernel.PR_GET_SECCOMP) == _MODE_FILTER and _programs_refused(),
        "no_new_privileges": kernel.prctl(kernel.PR_GET_NO_NEW_PRIVS) == 1,
        "not_dumpable": dumpable == 0,
        "no_core_dumps": resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
        and (dumpable == 0 or not kernel.LINUX),
        "no_capabilities": has_no_capabilities(),
        "no_outbound": no_outbound,
        "no_network": no_outbound and not any(_inherited_internet_sockets()),
    }


def require_protections(names: Collection[str] = REQUIRED) -> None:
    """Raise ``SandboxError`` naming those that are off."""
    measured = protections()
    missing = [name for name in names if not measured.get(name, False)]
    if missing:
        raise SandboxError(
            f"this machine cannot give the process: {', '.join(missing)}; "
            "run `fortpoint doctor`, or set engine.sandbox=best-effort to go on without"
        )


def _root_folder_refused() -> bool:
    try:
        os.close(os.open("/", os.O_RDONLY | os.O_DIRECTORY))
    except OSError as error:
        return error.errno == errno.EACCES
    return False


def _programs_refused() -> bool:
    """Try to run the program with the empty name: absent without a filter, refused with it."""
    kernel.libc().execve(b"", None, None)
    return ctypes.get_errno() in _REFUSED


def _socket_refused(family: socket.AddressFamily) -> bool:
    try:
        socket.socket(family, socket.SOCK_STREAM).close()
    except OSError as error:
        return error.errno in (*_REFUSED, errno.EAFNOSUPPORT)
    return False


def _inherited_internet_sockets() -> Iterator[int]:
    for descriptor in _descriptors():
        try:
            is_socket = stat.S_ISSOCK(os.fstat(descriptor).st_mode)
        except OSError:
            continue
        if is_socket and _family(descriptor) in (socket.AF_INET, socket.AF_INET6):
            yield descriptor


def _descriptors() -> Iterable[int]:
    """Those that are open, or, where ``/proc`` is lost, all that could be."""
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return range(min(soft, _MAX_DESCRIPTORS))


def _family(descriptor: int) -> int:
    """The socket's family; the descriptor stays open and the process's."""
    borrowed = socket.socket(fileno=descriptor)
    try:
        return int(borrowed.family)
    finally:
        borrowed.detach()
