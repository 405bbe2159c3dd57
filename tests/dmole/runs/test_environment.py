# SPDX-License-Identifier: Apache-2.0
"""What is recorded with a number: enough to judge it, nothing that names the user."""

import getpass
import json
from pathlib import Path

import torch

from dmole.runs.environment import describe_environment


def test_environment_is_complete_and_private() -> None:
    environment = describe_environment()
    text = json.dumps(environment)
    assert environment["threads"] == torch.get_num_threads()
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["cores"] >= 1
    assert environment["cpu"]
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text
    assert getpass.getuser() not in environment
