# SPDX-License-Identifier: Apache-2.0
"""The whole of a run as one frozen value: `RunConfig`, read from YAML and `--set a.b=c`.

Each section is a frozen keyword-only dataclass that checks its numbers when it is built. A method's own options live
in the method's file (`Method.Options`); in a configuration they stand under the method's name:

    methods: [one, another]
    lora: {rank: 8, alpha: 16}
    budget: {fraction: 0.5}
    one: {threshold: 2}
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from dmole.config_error import ConfigError, require
from dmole.methods import method_class, method_names
from dmole.methods.budget import BudgetSettings
from dmole.methods.settings import LoraSettings, MethodSettings
from dmole.models.declaration import Declaration
from dmole.patterns import check_pattern
from dmole.plain_values import check_plain
from dmole.sections import build_section, nearest
from dmole.strict_yaml import DEEPEST, load_yaml, read_yaml
from dmole.training.settings import RENAMED, TrainingSettings

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Which stages are tested, and how answers are generated; names as in transformers' GenerationConfig."""

    # "all": every task after every stage, N x N tests. "diagonal": each stage tests the task that it learned. "last":
    # each task is tested once, at the end. What is not tested is reported as not measured.
    stages: Literal["all", "diagonal", "last"] = "all"
    # Test the pretrained model first (row 0 of the matrix; runs of one output folder share it).
    zero_shot: bool = True
    # Samples in one batch of generation, on each device; tasks are mixed in a batch.
    per_device_eval_batch_size: int = 64
    # The longest answer in tokens, its end token included. A test answer that is longer is refused before the start.
    max_new_tokens: int = 32
    # 1: greedy, or sampling with do_sample. More: beam search with so many beams.
    num_beams: int = 1
    # Beam search divides a sequence's log-probability by its length to this power.
    length_penalty: float = 1.0
    # Above 1: tokens that are in the prompt or the answer already become less likely. 1 changes nothing.
    repetition_penalty: float = 1.0
    # Draw each token from the model's distribution instead of taking the likeliest.
    do_sample: bool = False
    # Sampling: logits are divided by it; below 1 likely tokens become likelier.
    temperature: float = 1.0
    # Sampling: only so many of the likeliest tokens can be drawn; 0 means all of them.
    top_k: int = 0
    # Sampling: only the likeliest tokens whose probabilities add up to this can be drawn; 1 means all of them.
    top_p: float = 1.0
    # Sampling: names the random numbers, with the task and the sample's id. Every stage draws the same ones.
    seed: int = 0

    def __post_init__(self) -> None:
        size = self.per_device_eval_batch_size
        require(size >= 1, "evaluation.per_device_eval_batch_size", size, "an integer of at least 1")
        for name in ("max_new_tokens", "num_beams"):
            require(getattr(self, name) >= 1, f"evaluation.{name}", getattr(self, name), "an integer of at least 1")
        for name in ("repetition_penalty", "temperature"):
            require(getattr(self, name) > 0, f"evaluation.{name}", getattr(self, name), "a number above 0")
        require(self.top_k >= 0, "evaluation.top_k", self.top_k, "0 (all tokens) or an integer above it")
        require(0 < self.top_p <= 1, "evaluation.top_p", self.top_p, "a number in (0, 1]")
        require(self.seed >= 0, "evaluation.seed", self.seed, "an integer of at least 0")
        beams = "1 together with do_sample: sampled beams draw for the whole batch, so an answer depends on its batch"
        require(not self.do_sample or self.num_beams == 1, "evaluation.num_beams", self.num_beams, beams)
        if not self.do_sample:
            for name, off in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("seed", 0)):
                value = getattr(self, name)
                require(value == off, f"evaluation.{name}", value, f"{off} without do_sample; set do_sample=true")


ORDER_HELP = "'default', 'reversed', 'shuffled<k>' or a comma-separated list of all task names"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides the numbers of `dmole run`, and where they go."""

    # A folder with stream.yaml, or a name that a package registers under dmole.streams. A run needs one.
    stream: str = ""
    # A folder in transformers' format, a hub id, or a name registered under dmole.models. A run needs one.
    model: str = ""
    # The dtype of the model's weights, such as bfloat16; none: as in the checkpoint. Experts are float32 either way.
    dtype: str | None = None
    # Where from_pretrained puts the weights, such as auto; none: on the device that accelerate chooses.
    device_map: str | None = None
    # int8: weights are quantised by torchao when they are loaded. A model that was saved quantised needs nothing here.
    quantization: Literal["int8"] | None = None
    # Identify the model by every byte of its weights; without it, those above 1 GiB are by their headers and commit.
    hash_weights: bool = False
    # What the rules cannot find out about the model; `dmole inspect --check` says whether they are right.
    declaration: Declaration = field(default_factory=Declaration)
    # Which methods learn the stream, one after another. A run needs one.
    methods: tuple[str, ...] = ()
    # One run of each method per seed.
    seeds: tuple[int, ...] = (0,)
    # Orders of the tasks, one run for each: "default", "reversed", "shuffled<k>" or all task names with commas.
    orders: tuple[str, ...] = ("default",)
    # Keep the first so many training samples of every task; none keeps all.
    train_samples: int | None = None
    # The same for validation samples.
    validation_samples: int | None = None
    # The same for test samples.
    test_samples: int | None = None
    # Where samples stay while a run works: disk for data that does not fit in memory. The numbers are the same.
    rows: Literal["memory", "disk"] = "memory"
    lora: LoraSettings = field(default_factory=LoraSettings)
    budget: BudgetSettings = field(default_factory=BudgetSettings)
    # Regular expression searched in the qualified names of the linears that may carry experts; "" keeps all of them.
    candidates: str = ""
    training: TrainingSettings = field(default_factory=TrainingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    # Options of single methods by method name; see the module docstring for how YAML spells them.
    options: Mapping[str, Any] = field(default_factory=dict)
    # The folder where results go.
    output: str = "runs"
    # Where there is no terminal, print a line with stage, step, loss and the time left at least every so many seconds;
    # 0 prints none.
    heartbeat_seconds: float = 60.0
    # Threads of torch. A setting, not the machine's number of cores, because results depend on it: losses with one and
    # with two threads differ in their last bits at first, and later in more.
    threads: int = 1

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in method_names():
                raise ConfigError(f"methods has {method!r}; {nearest(method, method_names())}")
        for method in self.options:
            if method not in method_names():
                raise ConfigError(f"options has {method!r}; {nearest(method, method_names())}")
        require(len(set(self.methods)) == len(self.methods), "methods", self.methods, "each method once")
        require(len(self.seeds) >= 1, "seeds", self.seeds, "at least one integer")
        require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "each seed once")
        require(all(seed >= 0 for seed in self.seeds), "seeds", self.seeds, "integers of at least 0")
        require(len(self.orders) >= 1, "orders", self.orders, f"at least one of {ORDER_HELP}")
        require(len(set(self.orders)) == len(self.orders), "orders", self.orders, "each order once")
        for name, least in (("train_samples", 2), ("validation_samples", 0), ("test_samples", 1)):
            value = getattr(self, name)
            require(value is None or value >= least, name, value, f"none (all samples) or an integer from {least} on")
        require(self.heartbeat_seconds >= 0, "heartbeat_seconds", self.heartbeat_seconds, "0 (no lines) or more")
        require(self.threads >= 1, "threads", self.threads, "a number of threads, at least 1: results depend on it")
        check_pattern("candidates", self.candidates)

    def method_settings(self, method: str) -> MethodSettings:
        """The settings that the method called `method` is built with."""
        return MethodSettings(
            lora=self.lora,
            candidates=self.candidates,
            budget=self.budget,
            options=self.options.get(method) or method_class(method).Options(),
        )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON, options of every method of the run written out: `build_config`'s input."""
        plain = {key: value for key, value in dataclasses.asdict(self).items() if key != "options"}
        for method in dict.fromkeys((*self.methods, *self.options)):
            options = dataclasses.asdict(self.method_settings(method).options)
            if options:
                plain[method] = options
        return typing.cast(dict[str, Any], json.loads(json.dumps(plain)))

    def replace(self, **changes: Any) -> RunConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def fingerprint(plain: object) -> str:
    """The first 16 hex digits of the sha256 of `plain` as canonical JSON."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def build_config(plain: Mapping[str, Any]) -> RunConfig:
    """`RunConfig` from nested mappings. Unknown keys and wrong types are `ConfigError`s that name the key."""
    check_plain(plain)
    own = {spec.name for spec in dataclasses.fields(RunConfig)} - {"options"}
    for method in own.intersection(method_names()):
        raise ConfigError(f"methods: got {method!r}, which is the name of a setting; expected another. Rename it.")
    options: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in plain.items():
        if key in method_names():
            options[key] = build_section(method_class(key).Options, value, key)
        elif key in own:
            rest[key] = value
        elif key == "checkpoint_every_steps":
            raise ConfigError(f"unknown key {key!r}: it is now called training.{RENAMED[key]}. Rename it.")
        else:
            raise ConfigError(f"unknown key {key!r}; {nearest(str(key), [*sorted(own), *method_names()])}")
    return build_section(RunConfig, rest, options=options)


def load_config(path: Path | None = None, *, base: RunConfig | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """A configuration from `base`, then the YAML file at `path`, then `overrides` of the form `a.b=c`."""
    plain = (base or RunConfig()).to_dict()
    if path is not None:
        try:
            read = read_yaml(path)
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
        except ValueError as error:  # a NUL in the path
            raise ConfigError(f"{path} cannot be read: {error}.") from error
        if read is None:
            read = {}
        if not isinstance(read, dict):
            raise ConfigError(f"{path} holds a {type(read).__name__}; expected a mapping of settings.")
        plain = _merge(plain, read)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set got {override!r}; expected key=value, such as training.num_train_epochs=3.")
        try:
            value: Any = load_yaml(text)
        except yaml.YAMLError as error:
            why = getattr(error, "problem", None) or " ".join(str(error).split())
            raise ConfigError(
                f"--set {ascii(key[:80])[1:-1]} got {ascii(text[:80])}, which is not YAML: {why}."
            ) from error
        parts = key.strip().split(".")
        require(len(parts) <= DEEPEST, "--set", key[:80], f"at most {DEEPEST} names with dots between them")
        for part in reversed(parts):
            value = {part: value}
        plain = _merge(plain, value)
    return build_config(plain)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
