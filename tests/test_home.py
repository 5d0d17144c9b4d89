from __future__ import annotations

import os
from pathlib import Path

import pytest

from fortpoint.errors import ConfigError, HomeInUse
from fortpoint.home import Home


def test_home_folders_are_their_owners_alone(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.make()
    for folder in (home.path, home.state, home.path / "models", home.path / "run"):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_home_locked_twice_names_the_holder(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.make()
    with home.locked(), pytest.raises(HomeInUse, match=f"process {os.getpid()}"), home.locked():
        pass
    with home.locked():
        pass


def test_home_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose a shorter one"):
        Home(tmp_path / ("x" * 120)).make()


def test_home_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot use"):
        Home(tmp_path / "file").make()
