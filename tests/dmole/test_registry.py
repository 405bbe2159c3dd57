# SPDX-License-Identifier: Apache-2.0
"""Entry points of packages: found by name, loaded when asked for, refused by name where they are something else."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from dmole import doctor
from dmole.cli import WRONG_INPUT, status
from dmole.config import RunConfig, build_config
from dmole.config_error import ConfigError
from dmole.methods import method_class, method_names
from dmole.metrics import METRICS
from dmole.recipes import RECIPES
from dmole.registry import registered
from dmole.sources import open_model, open_stream

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """`install("somebody", "[dmole.methods]...", "code")`: a package of one module, as pip leaves it."""

    def make(package: str, entry_points: str, code: str = "") -> None:
        site = tmp_path / package
        folder = site / f"{package}-1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(entry_points)
        (site / f"{package}.py").write_text(code)
        sys.modules.pop(package, None)
        monkeypatch.syspath_prepend(str(site))

    return make


def test_this_project_s_own_names_are_registered_like_anybody_s() -> None:
    assert registered("dmole.models")["mini"].value == "mini_cmit.model.shipped:mini_folder"
    assert registered("dmole.models")["tiny"].value == "mini_cmit.model.tiny:tiny_folder"
    assert registered("dmole.streams")["mini"].value == "mini_cmit.stream:mini_stream"
    assert {name: point.value for name, point in registered("dmole.recipes").items()} == {
        "coin": "dmole.recipes:coin",
        "demo": "mini_cmit.recipes:demo",
        "mini": "mini_cmit.recipes:mini",
        "paper": "dmole.recipes:paper",
        "released_code": "dmole.recipes:released_code",
    }
    assert list(METRICS) == sorted(METRICS) and set(METRICS) >= {"cider", "vqa", "iou"}
    assert len(METRICS) == len(list(METRICS)) and "accuracy" not in METRICS and METRICS["iou"] is METRICS["iou"]


METHOD = """
from dmole.methods.base import Pretrained
class Mine(Pretrained):
    name = "mine"
"""


def test_a_method_is_found_beside_our_own_and_loaded_when_it_is_asked_for(install: Install) -> None:
    install("somebody", "[dmole.methods]\nmine = somebody:Mine\nbroken = somebody:Absent\n", METHOD)
    assert method_names() == ("broken", "dmole", "finetune", "joint", "mine", "seq_ft", "zero_shot")
    assert method_class("mine").name == "mine" and RunConfig(methods=("mine",)).to_dict()["methods"] == ["mine"]
    # The broken one is nobody's business until it is named.
    assert build_config({"methods": ["mine", "dmole"]}).methods == ("mine", "dmole")
    with pytest.raises(
        ConfigError,
        match=r"dmole.methods: got 'broken', somebody:Absent of the package somebody, which fails to import "
        r"\(AttributeError: module 'somebody' has no attribute 'Absent'\); expected an importable name. Mend or unin",
    ):
        method_class("broken")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise RuntimeError('no licence')", r"fails to import \(RuntimeError: no licence\)"),
        ("import no_such_module", r"fails to import \(ModuleNotFoundError: No module named 'no_such_module'\)"),
        ("Mine = 3", "a int; expected a subclass of dmole.methods.base.Method. Mend or uninstall somebody"),
        ("class Mine: name = 'mine'", "a type; expected a subclass of dmole.methods.base.Method"),
        (
            "from dmole.methods import Method\nclass Mine(Method): name = 'mine'",
            "which does not define begin_stage, evaluation_gates, load_state, state, .*; expected every hook of Method",
        ),
        (METHOD.replace('"mine"', '"yours"'), "whose name is 'yours'; expected name = 'mine' in the class"),
        (METHOD + "    Options = dict\n", "whose Options is <class 'dict'>; expected a frozen dataclass as Options"),
    ],
    ids=["raises", "lacks", "value", "class", "abstract", "name", "options"],
)
def test_what_is_no_method_is_refused_by_name(
    code: str, message: str, install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("somebody", "[dmole.methods]\nmine = somebody:Mine\n", code)
    with pytest.raises(
        ConfigError, match=f"dmole.methods: got 'mine', somebody:Mine of the package somebody, .*{message}"
    ):
        method_class("mine")
    assert status(["run", "mini", "--model", "tiny", "--method", "mine", "-o", str(tmp_path / "out")]) == WRONG_INPUT
    assert capsys.readouterr().err.startswith(
        "error: dmole.methods: got 'mine', somebody:Mine of the package somebody, "
    )
    (found,) = [finding for finding in doctor.examine() if finding.what == "mine"]
    assert not found.ok and "somebody:Mine of the package somebody" in found.found


def test_names_that_clash_are_refused(install: Install) -> None:
    install("somebody", "[dmole.methods]\nmine = somebody:Mine\n", METHOD)
    install("another", "[dmole.methods]\nmine = another:Mine\n", METHOD)
    with pytest.raises(
        ConfigError,
        match="dmole.methods: got 'mine' twice, another:Mine of the package another and somebody:Mine of the package "
        "somebody; expected each name once. Uninstall one of the two packages.",
    ):
        method_names()
    (found,) = [finding for finding in doctor.examine() if finding.what == "dmole.methods"]
    assert not found.ok and "got 'mine' twice" in found.found


@pytest.mark.parametrize(
    ("group", "name", "ask"),
    [("dmole.methods", "seq_ft", method_names), ("dmole.metrics", "vqa", lambda: list(METRICS))],
)
def test_our_own_names_are_taken(group: str, name: str, ask: Callable[[], object], install: Install) -> None:
    install("somebody", f"[{group}]\n{name} = somebody:Mine\n", METHOD)
    with pytest.raises(
        ConfigError, match=f"{group}: got '{name}', somebody:Mine of the package somebody, a name of dmole's own; expec"
    ):
        ask()


def test_a_method_called_like_a_setting_is_refused(install: Install) -> None:
    install("somebody", "[dmole.methods]\nlora = somebody:Mine\n", METHOD.replace("mine", "lora"))
    with pytest.raises(
        ConfigError, match="methods: got 'lora', which is the name of a setting; expected another. Rename"
    ):
        build_config({})


def test_a_method_s_name_can_name_a_folder(install: Install) -> None:
    install("somebody", "[dmole.methods]\n../mine = somebody:Mine\n", METHOD.replace("mine", "../mine"))
    with pytest.raises(
        ConfigError, match="which names folders and settings; expected lower-case letters, digits and '_'"
    ):
        method_class("../mine")


def test_metrics_of_packages(install: Install) -> None:
    code = """
from dmole.metrics import Metric
class Whole(Metric):
    name = "whole"
    def score_samples(self, predictions, samples): return [1.0 for _ in samples]
    def well_formed(self, prediction, sample): return True
    def check(self, sample, *, test): return []
class Half(Metric):
    name = "half"
"""
    install("somebody", "[dmole.metrics]\nwhole = somebody:Whole\nhalf = somebody:Half\nother = somebody:Whole\n", code)
    assert METRICS["whole"].evaluate(["a"], [object()]) == 100.0  # type: ignore[list-item]
    with pytest.raises(
        ConfigError, match="'half', .* which does not define check, score_samples, well_formed; expected"
    ):
        METRICS["half"]
    with pytest.raises(ConfigError, match="'other', .* whose name is 'whole'; expected name = 'other' in the class"):
        METRICS["other"]


def test_recipes_streams_and_models_of_packages(install: Install, toy_folder: Path) -> None:
    code = f"""
from dmole.config import RunConfig
def fast(): return RunConfig(stream="theirs")
def none(): return None
def theirs(say):
    say("building theirs")
    return {str(toy_folder)!r}
def nowhere(*say): return "/no/such/folder"
"""
    names = "[dmole.recipes]\nfast = somebody:fast\nnone = somebody:none\n"
    names += "[dmole.streams]\ntheirs = somebody:theirs\nlost = somebody:nowhere\nvalue = somebody:RunConfig\n"
    names += "[dmole.models]\nlost = somebody:nowhere\n"
    install("somebody", names, code)
    screen = Console(file=io.StringIO(), width=200)
    assert RECIPES["fast"]().stream == "theirs"
    assert open_stream("theirs", screen).name == "toy" and screen.file.getvalue() == "building theirs\n"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="'none', somebody:none .* which returns a NoneType; expected a RunConfig"):
        RECIPES["none"]()
    lost = "'lost', somebody:nowhere .* which returns '/no/such/folder'; expected the path of a folder. Mend or uninst"
    with pytest.raises(ConfigError, match=f"dmole.streams: got {lost}"):
        open_stream("lost", screen)
    with pytest.raises(ConfigError, match=f"dmole.models: got {lost}"):
        open_model(RunConfig(model="lost"))
    with pytest.raises(ConfigError, match="'value', .* a type; expected a function"):
        open_stream("value", screen)
