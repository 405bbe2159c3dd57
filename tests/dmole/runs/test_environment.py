# SPDX-License-Identifier: Apache-2.0
"""What is recorded with a number: enough to judge it, nothing that names the user."""

import getpass
import json
from pathlib import Path

import torch

import dmole
from dmole.runs.environment import describe_environment


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
