# SPDX-License-Identifier: Apache-2.0
"""`dmole config` and the page of settings: complete, commented, and readable by `dmole run --config`."""

from pathlib import Path

import pytest
import yaml

from dmole.cli import WRONG_INPUT, status
from dmole.config import RunConfig, build_config, load_config
from dmole.methods import method_names
from dmole.recipes import RECIPES
from dmole.settings_text import Setting, settings, yaml_text
from scripts.settings_page import markdown_page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"


def leaves(plain: dict[str, object], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key, value in plain.items():
        if isinstance(value, dict) and value:
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found.add(f"{prefix}{key}")
    return found


def test_every_setting_is_there_and_has_a_comment() -> None:
    listed = settings(RunConfig())
    every = RunConfig(methods=("dmole", "seq_ft")).to_dict()
    assert {setting.path for setting in listed if not setting.section} >= leaves(every)
    assert [setting.path for setting in listed if not setting.comment] == []
    assert len({setting.path for setting in listed}) == len(listed)


def by_path(config: RunConfig) -> dict[str, Setting]:
    return {setting.path: setting for setting in settings(config)}


def test_comments_are_those_of_the_source() -> None:
    found = by_path(RunConfig())
    assert found["lora.dropout_mode"].comment == (
        'One mask per layer is what a packed kernel wants; "per_expert" is what D-MoLE\'s public code draws.'
    )
    assert found["lora.dropout_mode"].kind == "shared, per_expert"
    assert found["training.epochs_of"].kind == "number by name"
    assert found["train_samples"].kind == "integer or none" and found["methods"].kind == "list of text"
    assert found["dmole.router"].section and found["dmole.router.top_k"].value == 2
    assert found["evaluation"].comment.startswith("Which stages are tested, and how answers are generated")


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_what_is_printed_is_read_back(recipe: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [] if recipe is None else ["--recipe", recipe]
    assert (
        status(["config", *chosen, "--set", "training.num_train_epochs=7", "--set", "orders=['a: b', reversed]"]) == 0
    )
    printed = capsys.readouterr().out
    file = tmp_path / "settings.yaml"
    file.write_text(printed)
    base = None if recipe is None else RECIPES[recipe]()
    expected = load_config(base=base, overrides=["training.num_train_epochs=7", "orders=['a: b', reversed]"])
    # The print-out has the options of every method, whether it runs or not.
    every = method_names()
    assert load_config(file).methods == expected.methods
    assert load_config(file).replace(methods=every).to_dict() == expected.replace(methods=every).to_dict()
    assert build_config(yaml.safe_load(printed)).to_dict() == load_config(file).to_dict()
    assert all(len(line) <= 100 or "#" not in line for line in printed.splitlines())


def test_a_value_stands_under_its_own_comment() -> None:
    lines = yaml_text(RunConfig()).splitlines()
    place = lines.index("  temperature: 1.0")
    assert lines[place - 1] == "  # Sampling: logits are divided by it; below 1 likely tokens become likelier. [number]"


def test_the_page_is_made_from_the_code() -> None:
    assert PAGE.read_text() == markdown_page(), "run: python scripts/settings_page.py > docs/settings.md"


def test_wrong_options_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text in (
        (["config", "--recipe", "dmo"], "error: --recipe is 'dmo'; expected one of coin, demo, mini, paper"),
        (["config", "--set", "training.epoch=3"], "error: unknown key 'training.epoch'"),
    ):
        assert status(arguments) == WRONG_INPUT
        captured = capsys.readouterr()
        assert captured.err.startswith(text) and captured.out == "" and len(captured.err.splitlines()) == 1
