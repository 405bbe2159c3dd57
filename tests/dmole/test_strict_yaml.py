# SPDX-License-Identifier: Apache-2.0
"""YAML means one thing, and what no run can be set to is refused before it starts."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmole.config import build_config, load_config
from dmole.config_error import ConfigError
from dmole.patterns import check_pattern, matches
from dmole.strict_yaml import load_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:30", "1:30"), ("on", "on"), ("yes", "yes"), ("no", "no"), ("017", "017"), ("0o17", "0o17"),
        ("0x1F", "0x1F"),
        ("1_000", "1_000"), ("2026-11-27", "2026-11-27"), ("true", True), ("~", None), ("", None), ("12", 12),
        ("1e-3", 1e-3), ("-.5", -0.5), ("'12'", "12"), (json.dumps("\U0001f600/a"), "\U0001f600/a"),
        ("{a: [1, b], 2: c}", {"a": [1, "b"], "2": "c"}),
    ],
)  # fmt: skip
def test_a_scalar_is_what_is_written(text: str, value: Any) -> None:
    found = load_yaml(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: 1\na: 2", "key 'a' is given twice"),
        ("a: &x [1]\nb: *x", "holds an anchor or alias; write it out"),
        ("a: !!bool x", "holds a tag; expected plain YAML without tags"),
        ("[" * 100_000, "holds nesting deeper than 50; expected flat settings"),
        ("9" * 400, "holds an integer of 400 digits; expected one of 64 bits"),
        ('"\\ud83d"', "holds half of a surrogate pair; expected whole characters"),
        ("? [a]\n: b", "has a key that is a list or a mapping; expected a name"),
        ("a\n---\nb", "but found another document"),
        (" " * 2**20 + "a", "expected at most 1048576"),
    ],
)
def test_what_is_slow_deep_or_ambiguous_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(yaml.YAMLError, match=complaint.replace("[", r"\[")):
        load_yaml(text)


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not YAML: is not UTF-8 text"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfoutput: x")
    assert read_yaml(tmp_path / "a.yaml") == {"output": "x"}


def test_a_repeated_key_of_a_configuration_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("output: a\noutput: b\n")
    with pytest.raises(ConfigError, match="key 'output' is given twice.*line 2"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("threads=1:30", "threads is '1:30'; expected an integer"),
        ("lora.rank=1000000000", "lora.rank is 1000000000; expected an integer from 1 to 65536"),
        ("evaluation.top_k=1" + "0" * 30, "holds an integer of 31 digits; expected one of 64 bits"),
        ("candidates='('", "candidates is '\\('; expected a regular expression"),
        ("a." * 3000 + "b=1", "expected at most 50 names with dots between them"),
        ("declaration.candidates=7", "declaration.candidates is 7; expected endings of names"),
        ("output=!!bool x", "holds a tag"),
        ("zero_shot={a: &a [*a]}", "holds an anchor or alias"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(override: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config(overrides=[override])


def _deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("\ud83d", "output holds half of a surrogate pair"),
        ("a\0b", "output holds the character NUL"),
        (10**400, "output is an integer of 1329 bits; expected one of 64 bits"),
        (_deep(100_000), "is nested deeper than 50"),
        ({7: 1}, "output has a key of type int; expected a name"),
    ],
)
def test_a_value_that_no_setting_can_have_is_refused(value: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        build_config({"output": value})


def test_a_path_beyond_u_ffff_is_read_back() -> None:
    assert load_config(overrides=["output=" + json.dumps("\U0001f600/runs")]).output == "\U0001f600/runs"


def test_a_pattern_without_an_end_is_refused_while_it_is_matched() -> None:
    check_pattern("candidates", "(a+)+(b+)+$")
    with pytest.raises(ConfigError, match=r"candidates is .*; expected a regular expression that is matched in 1 s"):
        matches("candidates", r"(a|aa|a?)+\d\1$", "a" * 200, whole=False)
    assert matches("candidates", "q_proj|v_proj", "layers.0.q_proj", whole=False)
    assert not matches("candidates", "q_proj|v_proj", "layers.0.q_proj", whole=True)


def test_a_pattern_that_cannot_be_compiled_is_refused() -> None:
    for pattern in ("(", "a{2,1}", "(" * 1500, "x" * 3000):
        with pytest.raises(ConfigError, match="candidates is .*; expected a regular expression"):
            check_pattern("candidates", pattern)


@pytest.mark.parametrize("pattern", ["a{99999999}}", "(a{1000}){1000}", "[ab]{0,99999999}", "a{99999999,}"])
def test_a_pattern_whose_counts_fill_the_memory_is_refused_before_it_is_compiled(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"candidates is .* \(its counts repeat more than 100000 times\)\."):
        check_pattern("candidates", pattern)
    check_pattern("candidates", r"layers\.\d{1,2}\.(a{3}){10,20}")
