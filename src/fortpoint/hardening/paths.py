"""What Python and torch must still be able to read once their files are confined.

Measured with strace on torch 2.13 (CPU, Linux): beside these it opens nothing that it needs.
It asks for no writable place at all; ``/tmp``, ``/dev/shm`` and ``~/.cache`` stay closed.
"""

from __future__ import annotations

import os
import site
import ssl
import sys
import sysconfig
from pathlib import Path

_SYSTEM_LIBRARIES = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/etc/ld.so.cache",
)
_RUNTIME = (
    "/proc/self",  # maps, status, environ: this process only
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/sys/devices/system/cpu",
    "/sys/devices/system/node",
    "/sys/fs/cgroup",
    "/dev/urandom",
    "/dev/null",
    "/etc/localtime",
    "/usr/share/zoneinfo",
    "/usr/share/locale",
)
# What glibc reads to look a name up, and where distributions keep the authorities' certificates
# (the hashed names in one are links into another). Never all of /etc/ssl: it holds private keys.
_OUTBOUND = (
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/run/systemd/resolve",
    "/etc/ssl/certs",
    "/etc/ssl/cert.pem",
    "/etc/ssl/openssl.cnf",
    "/etc/pki/tls/certs",
    "/etc/pki/ca-trust/extracted",
    "/usr/share/ca-certificates",
    "/usr/local/share/ca-certificates",
)
_PACKAGE = Path(__file__).resolve().parents[1]


def python_paths() -> tuple[Path, ...]:
    """Folders of the interpreter's library, installed packages, this package, shared objects.

    The current folder and other entries of ``sys.path`` outside the interpreter's own
    prefixes are left out: they may be anybody's, and the product's state may lie in them.
    """
    schemes = sysconfig.get_paths()
    found = [schemes[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    found += [entry for entry in sys.path if entry and _beneath_prefix(Path(entry))]
    found += site.getsitepackages()
    if site.ENABLE_USER_SITE:
        found.append(site.getusersitepackages())
    if libdir := sysconfig.get_config_var("LIBDIR"):
        found.append(str(libdir))
    found += [str(Path(sys.prefix) / "pyvenv.cfg"), str(_PACKAGE), *_SYSTEM_LIBRARIES]
    return _existing(found)


def runtime_paths() -> tuple[Path, ...]:
    """Kernel files about this process and the processor, the clock's zone, random bytes.

    ``/proc/self`` is this very process: call it after ``fork``, not before.
    """
    return _existing(_RUNTIME)


def outbound_paths() -> tuple[Path, ...]:
    """What looking names up and verifying certificates reads; ``SSL_CERT_FILE`` is honoured."""
    found = ssl.get_default_verify_paths()
    certificates = [path for path in (found.cafile, found.capath) if path]
    return _existing([*_OUTBOUND, *certificates])


def _beneath_prefix(path: Path) -> bool:
    prefixes = {Path(p) / "lib" for p in (sys.prefix, sys.base_prefix, sys.exec_prefix)}
    return any(path.is_relative_to(prefix) for prefix in prefixes)


def _existing(paths: list[str] | tuple[str, ...]) -> tuple[Path, ...]:
    return tuple(Path(path) for path in dict.fromkeys(paths) if os.path.exists(path))
