# SPDX-License-Identifier: Apache-2.0
"""Configurations: what is read back is what was written, and what is wrong is named."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import get_args

import pytest
from transformers import EarlyStoppingCallback, SchedulerType, TrainingArguments

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
from dmole.methods import method_names
from dmole.methods.budget import BudgetSettings
from dmole.methods.dmole.settings import DMoLESettings
from dmole.training.settings import OWN_NAMES, REFUSED, RENAMED, WITHOUT_EFFECT, Schedule


def test_plain_form_round_trips() -> None:
    config = load_config(overrides=["budget.fraction=0.25", "dmole.router.top_k=1", "seeds=[3, 1]"])
    plain = config.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert build_config(plain).to_dict() == plain
    assert plain["budget"] == {"fraction": 0.25, "unit": "linear"}
    assert plain["dmole"]["router"]["top_k"] == 1
    assert plain["seeds"] == [3, 1]


def test_yaml_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "methods: [seq_ft]\nseq_ft: {mode: merge_and_restart}\ntraining: {num_train_epochs: 2, learning_rate: 1e-4}\n"
    )
    config = load_config(path, overrides=["training.num_train_epochs=5", "methods=dmole"])
    assert config.training.num_train_epochs == 5.0
    assert config.training.learning_rate == 1e-4
    assert config.methods == ("dmole",)
    assert config.method_settings("seq_ft").options.mode == "merge_and_restart"


def test_every_method_is_told_the_budget() -> None:
    config = load_config(overrides=["budget.fraction=0.25", "budget.unit=layer"])
    for method in method_names():
        assert config.method_settings(method).budget == BudgetSettings(fraction=0.25, unit="layer")


def test_options_of_methods_that_do_not_run_are_not_part_of_the_run() -> None:
    assert "dmole" not in load_config(overrides=["methods=seq_ft"]).to_dict()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs=3", r"unknown key 'epochs'; "),
        ("trainning.epochs=3", r"unknown key 'trainning'; did you mean 'training'\?"),
        ("training.epoch=3", r"unknown key 'training.epoch'; did you mean 'epochs_of'\?"),
        ("dmole.router.topk=3", r"unknown key 'dmole.router.topk'; did you mean 'top_k'\?"),
        ("training.num_train_epochs=three", r"training.num_train_epochs is 'three'; expected a number"),
        ("training.num_train_epochs=true", r"training.num_train_epochs is True; expected a number"),
        ("training.num_train_epochs=0", r"training.num_train_epochs is 0.0; expected a number above 0"),
        ("training.epochs_of={maps: 0}", r"training.epochs_of.maps is 0.0"),
        ("training.learning_rate=.inf", r"training.learning_rate is inf; expected a finite number"),
        ("training.bf16=1", r"training.bf16 is 1; expected true or false"),
        ("training=3", r"training is 3; expected a mapping"),
        ("training.warmup_steps=-1", r"training.warmup_steps is -1.0; expected a number of steps, or a share"),
        ("training.optim=lomo", r"training.optim is 'lomo'; expected one of 'adamw_torch', 'adamw_torch_fused', 'sgd'"),
        ("training.lr_scheduler_type=greedy", r"training.lr_scheduler_type is 'greedy'; expected one of 'linear'"),
        ("training.adam_beta2=1", r"training.adam_beta2 is 1.0; expected a number in \[0, 1\)"),
        ("training={bf16: true, fp16: true}", r"training.fp16 is True; expected false beside bf16: true"),
        ("training.early_stopping_patience=2", r"early_stopping_patience is 2; expected eval_strategy 'steps' or"),
        ("training.load_best_model_at_end=true", r"load_best_model_at_end is True; expected eval_strategy 'steps'"),
        ("training.save_steps=0", r"training.save_steps is 0.0; expected a number above 0"),
        ("training.epochs=3", r"unknown key 'training.epochs': it is now called training.num_train_epochs. Rename"),
        ("training.batch_size=3", r"it is now called training.per_device_train_batch_size. Rename it."),
        ("training.warmup=0.1", r"it is now called training.warmup_steps \(a number below 1 is a share of the steps\)"),
        ("training.warmup_ratio=0.1", r"'training.warmup_ratio': it is now called training.warmup_steps"),
        ("training.gradient_checkpointing=true", r"it is now called training.activation_checkpointing. Rename it."),
        ("checkpoint_every_steps=9", r"unknown key 'checkpoint_every_steps': it is now called training.save_steps"),
        ("training.label_smoothing_factor=0.1", r"training.label_smoothing_factor is not supported. The loss is the"),
        ("training.torch_compile=true", r"training.torch_compile is a setting of transformers' TrainingArguments that"),
        ("lora.dropout=1", r"lora.dropout is 1.0; expected a number in \[0, 1\)"),
        ("lora.dropout_mode=both", r"lora.dropout_mode is 'both'; expected one of 'shared', 'per_expert'"),
        ("lora.rank=0", r"lora.rank is 0"),
        ("seq_ft.mode=never", r"seq_ft.mode is 'never'; expected one of 'continue', 'merge_and_restart'"),
        ("methods=seqft", r"methods has 'seqft'; did you mean 'seq_ft'\?"),
        ("budget.fraction=0", r"budget.fraction is 0.0; expected a number in \(0, 1\]"),
        ("budget.unit=block", r"budget.unit is 'block'; expected one of 'linear', 'layer'"),
        ("dmole.budget_fraction=0.5", r"unknown key 'dmole.budget_fraction': it is now called budget.fraction, for ev"),
        ("dmole.unit=layer", r"unknown key 'dmole.unit': it is now called budget.unit, for every method. Rename it."),
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
    with pytest.raises(ConfigError, match=r"--set got 'training.num_train_epochs'; expected key=value"):
        load_config(overrides=["training.num_train_epochs"])


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
    with pytest.raises(ConfigError, match=r"training.per_device_train_batch_size is 0"):
        TrainingSettings(per_device_train_batch_size=0)


def test_training_settings_have_the_names_of_transformers() -> None:
    known = {spec.name for spec in dataclasses.fields(TrainingArguments)}
    ours = {spec.name for spec in dataclasses.fields(TrainingSettings)}
    assert ours - known == set(OWN_NAMES)
    callback = set(inspect.signature(EarlyStoppingCallback).parameters)
    assert {name for name in OWN_NAMES if name != "epochs_of"} == callback
    assert not ours & {*RENAMED, *REFUSED}
    assert set(REFUSED) <= known and set(WITHOUT_EFFECT) <= ours
    assert {name.split()[0] for name in RENAMED.values()} <= ours


def test_schedules_are_those_of_transformers_that_follow_from_the_step() -> None:
    measuring = {SchedulerType.REDUCE_ON_PLATEAU.value, SchedulerType.GREEDY.value}
    assert set(get_args(Schedule)) == {kind.value for kind in SchedulerType} - measuring


def test_settings_that_go_to_transformers_mean_the_same_there(tmp_path: Path) -> None:
    shares = {"warmup_steps": 0.03, "eval_steps": 0.25, "eval_strategy": "steps", "logging_steps": 7}
    ours = build_config({"training": shares}).training
    theirs = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **shares)
    assert ours.count("warmup_steps", 101) == theirs.get_warmup_steps(101) == 4
    assert ours.count("eval_steps", 10) == 3  # as Trainer: ceil(10 * 0.25)
    assert dataclasses.replace(ours, eval_steps=None).count("eval_steps", 100) == 7
    assert dataclasses.replace(ours, warmup_steps=12).count("warmup_steps", 101) == 12
