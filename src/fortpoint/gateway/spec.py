"""What the gateway's process is told by its parent."""

from __future__ import annotations

import msgspec

from fortpoint.config import Config


class GatewaySpec(msgspec.Struct, frozen=True):
    """``socket_fd`` is the inherited listening socket; ``engine_socket`` a path."""

    config: Config
    socket_fd: int
    engine_socket: str
    parent_pid: int
