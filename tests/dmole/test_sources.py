# SPDX-License-Identifier: Apache-2.0
"""Names of models and streams come from the entry points of installed packages; anything else is a folder."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from dmole.config import RunConfig
from dmole.config_error import ConfigError
from dmole.sources import open_model, open_stream
from mini_cmit.model.tiny import write_tiny_model


@pytest.fixture
def screen() -> Console:
    return Console(file=io.StringIO(), width=200)


def shown(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_a_name_that_nobody_registers_is_refused_with_those_that_are(screen: Console) -> None:
    with pytest.raises(ConfigError, match="model: got 'mimi', which is no folder; expected .*, or one of mini, tiny"):
        open_model(RunConfig(model="mimi"))
    with pytest.raises(ConfigError, match="stream: got 'mimi', which is no folder; expected .*stream.yaml, or one of"):
        open_stream("mimi", screen)


def test_without_any_registered_name_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmole.registry._entry_points", lambda group, path: ())
    with pytest.raises(ConfigError, match="or a registered name, of which there is none: install dmole with pip"):
        open_model(RunConfig(model="mini"))


def test_a_folder_beside_the_names_is_read(tmp_path: Path, toy_folder: Path, screen: Console) -> None:
    folder = write_tiny_model(tmp_path / "own", seed=4)
    own = open_model(RunConfig(model=str(folder)))
    assert own.declaration.rows == "images" and own.source == str(folder)
    assert open_stream(str(toy_folder), screen).name == "toy"
    assert set(open_model(RunConfig(model="tiny")).candidates) == {"vision", "language"}
