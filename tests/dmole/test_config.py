# SPDX-License-Identifier: Apache-2.0
"""Configurations: what is read back is what was written, and what is wrong is named."""

import json
from pathlib import Path

import pytest

from dmole.config import (
    LoraSettings,
    MethodSettings,
    RunConfig,
    TrainingSettings,
    build_config,
    fingerprint,
    load_config,
)
from dmole.config_error import ConfigError
from dmole.method_settings import DMoLESettings


def test_plain_form_round_trips() -> None:
    config = load_config(overrides=["dmole.budget_fraction=0.25", "dmole.router.top_k=1", "seeds=[3, 1]"])
    plain = config.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert build_config(plain).to_dict() == plain
    assert plain["dmole"]["budget_fraction"] == 0.25
    assert plain["dmole"]["router"]["top_k"] == 1
    assert plain["seeds"] == [3, 1]


def test_yaml_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "methods: [seq_ft]\nseq_ft: {mode: merge_and_restart}\ntraining: {epochs: 2, learning_rate: 1e-4}\n"
    )
    config = load_config(path, overrides=["training.epochs=5", "methods=dmole"])
    assert config.training.epochs == 5
    assert config.training.learning_rate == 1e-4
    assert config.methods == ("dmole",)
    assert config.method_settings("seq_ft").options.mode == "merge_and_restart"


def test_every_method_is_told_dmoles_budget() -> None:
    config = load_config(overrides=["methods=seq_ft", "dmole.budget_fraction=0.25"])
    assert config.method_settings("seq_ft").dmole.budget_fraction == 0.25


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs=3", r"unknown key 'epochs'; "),
        ("trainning.epochs=3", r"unknown key 'trainning'; did you mean 'training'\?"),
        ("training.epoch=3", r"unknown key 'training.epoch'; did you mean 'epochs'\?"),
        ("dmole.router.topk=3", r"unknown key 'dmole.router.topk'; did you mean 'top_k'\?"),
        ("training.epochs=three", r"training.epochs is 'three'; expected an integer"),
        ("training.epochs=true", r"training.epochs is True; expected an integer"),
        ("training.epochs=0", r"training.epochs is 0; expected an integer of at least 1"),
        ("training.epochs_of={maps: 0}", r"training.epochs_of.maps is 0"),
        ("training.learning_rate=.inf", r"training.learning_rate is inf; expected a finite number"),
        ("training.bf16=1", r"training.bf16 is 1; expected true or false"),
        ("training=3", r"training is 3; expected a mapping"),
        ("training.warmup=1", r"training.warmup is 1.0; expected a share"),
        ("lora.dropout=1", r"lora.dropout is 1.0; expected a number in \[0, 1\)"),
        ("lora.dropout_mode=both", r"lora.dropout_mode is 'both'; expected one of 'shared', 'per_expert'"),
        ("lora.rank=0", r"lora.rank is 0"),
        ("seq_ft.mode=never", r"seq_ft.mode is 'never'; expected one of 'continue', 'merge_and_restart'"),
        ("methods=seqft", r"methods has 'seqft'; did you mean 'seq_ft'\?"),
        ("methods=[]", r"methods is \(\); expected at least one method"),
        ("methods=[dmole, dmole]", r"methods is .*; expected each method once"),
        ("seeds=[0, 0]", r"seeds is \(0, 0\); expected each seed once"),
        ("seeds=[-1]", r"seeds is \(-1,\); expected integers of at least 0"),
        ("train_samples=1", r"train_samples is 1; expected none \(all samples\) or an integer from 2 on"),
        ("evaluation.per_device_eval_batch_size=0", r"evaluation.per_device_eval_batch_size is 0"),
        ("candidates='['", r"candidates is '\['; expected a regular expression"),
        ("threads=0", r"threads is 0; expected a number of threads, at least 1: results depend on it"),
        ("stream=3", r"stream is 3; expected a string"),
        ("dmole.proxy_fraction=0", r"dmole.proxy_fraction is 0"),
    ],
)
def test_wrong_settings_are_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(overrides=[override])


def test_override_without_value() -> None:
    with pytest.raises(ConfigError, match=r"--set got 'training.epochs'; expected key=value"):
        load_config(overrides=["training.epochs"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.yaml cannot be read: No such file"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"a.yaml is not YAML"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match=r"b.yaml holds a list; expected a mapping"):
        load_config(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("")
    assert load_config(tmp_path / "c.yaml").to_dict() == RunConfig().to_dict()


def test_candidate_filter() -> None:
    candidates = {"vision": ("v.q_proj", "v.fc1"), "language": ("l.q_proj", "l.up_proj")}
    assert MethodSettings(candidates="q_proj$").select_candidates(candidates) == {
        "vision": ("v.q_proj",),
        "language": ("l.q_proj",),
    }
    with pytest.raises(
        ConfigError, match=r"candidates is 'fc1', which matches no linear of the language tower; .*'l.q"
    ):
        MethodSettings(candidates="fc1").select_candidates(candidates)


def test_options_of_another_method_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method options are DMoLESettings; expected LoraSettings"):
        MethodSettings(options=DMoLESettings()).options_as(LoraSettings)


def test_fingerprint_ignores_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_sections_check_themselves_without_yaml() -> None:
    with pytest.raises(ConfigError, match=r"training.batch_size is 0"):
        TrainingSettings(batch_size=0)
