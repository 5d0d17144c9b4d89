"""What a process gives up before it touches weights or a stranger's bytes.

Once given up, nothing here can be taken back by the process itself. The order matters:

    harden_process(parent_pid=ppid)          # one thread: capabilities, core dumps, ptrace
    confine_files(read=[*python_paths(), *runtime_paths(), model_folder])   # one thread: Landlock
    forbid_syscalls(ENGINE)                  # seccomp; any number of threads
    require_protections(REQUIRED)            # raises SandboxError if the kernel lacks one

Every step returns whether it took effect: ``False`` where the platform has no such thing
(macOS, an old kernel), ``SandboxError`` where it has one and it failed. ``protections()``
does not trust either answer; it measures the running process by trying.

Not protected here: file descriptors that were open before (start the process with closed
ones), the kernel itself, side channels, and a root user with ``CAP_SYS_PTRACE`` outside, who
can read any process. ``docs/adr/0002-process-sandbox.md`` has the list and the reasons.
"""

from fortpoint.hardening.landlock import confine_files, landlock_abi
from fortpoint.hardening.paths import outbound_paths, python_paths, runtime_paths
from fortpoint.hardening.process import harden_process
from fortpoint.hardening.profiles import ENGINE, GATEWAY, GATEWAY_OUTBOUND, Profile
from fortpoint.hardening.protections import REQUIRED, protections, require_protections
from fortpoint.hardening.seccomp import forbid_syscalls, seccomp_available

__all__ = [
    "ENGINE",
    "GATEWAY",
    "GATEWAY_OUTBOUND",
    "REQUIRED",
    "Profile",
    "confine_files",
    "forbid_syscalls",
    "harden_process",
    "landlock_abi",
    "outbound_paths",
    "protections",
    "python_paths",
    "require_protections",
    "runtime_paths",
    "seccomp_available",
]
