# SPDX-License-Identifier: Apache-2.0
"""What is recorded with a number: enough to judge it, nothing that names the user."""

import getpass
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

import dmole
from dmole.config import RunConfig
from dmole.runs.checkpoint import CheckpointError
from dmole.runs.environment import describe_environment
from dmole.runs.runner import run


def test_environment_is_complete_and_private() -> None:
    environment = describe_environment()
    text = json.dumps(environment)
    assert environment["threads"] == torch.get_num_threads()
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["cores"] >= 1
    assert environment["cpu"]
    checkout = (Path(dmole.__file__).parents[1] / ".git").exists()
    assert (environment["commit"] is not None) == checkout, "a number names the commit that made it"
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text
    assert getpass.getuser() not in environment


def test_a_resume_is_added_to_the_environment_of_the_start(toy_config: Callable[..., RunConfig]) -> None:
    config = toy_config("methods=[zero_shot]")
    console = Console(file=io.StringIO())
    folder = run(config, console=console) / "runs" / "zero_shot-seed0-default"
    path = folder / "environment.json"
    first = json.loads(path.read_text())
    assert "resumes" not in first and first["kernels"] in ("cpu", "reference")
    (folder / "result.json").unlink()
    path.write_text(json.dumps({**first, "commit": "of the start"}))
    run(config, console=console)
    later = json.loads(path.read_text())
    assert later == {**first, "commit": "of the start", "resumes": [first]}
    result = json.loads((folder / "result.json").read_text())
    assert result["made_with"]["commit"] == first["commit"], "what computed the last numbers"
    (folder / "result.json").unlink()
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"environment\.json was truncated or edited; expected what the run was"):
        run(config, console=console)
