# SPDX-License-Identifier: Apache-2.0
"""The benchmark harness on tiny shapes: which providers are refused, what is counted and written. Asserts no times."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import run, tables
from benchmarks import summary as summary_module
from benchmarks.benchmark import Benchmark, CannotTake, Outcome, Provider, check_and_time, report
from benchmarks.grad_norm_suite import NormCase, accumulate_benchmark, norm_benchmark, opacus_einsum
from benchmarks.lora_benchmark import lora_benchmark
from benchmarks.lora_case import LoraCase, LoraProblem, make_problem
from benchmarks.lora_providers import Built, cpu_backends, module_of, packed_eager, peft_mixed
from benchmarks.lora_suite import entries
from benchmarks.machine import Machine
from benchmarks.memory import peak_memory_mib, saved_for_backward_bytes
from benchmarks.proxy_suite import ProxyCase, proxy_benchmark
from benchmarks.records import COLUMNS, read_rows
from benchmarks.router_suite import ScoreCase, pool_benchmark, score_benchmark, select_benchmark
from benchmarks.timing import interleaved, paired_ratio, percentiles_ms

CASE = LoraCase(name="tiny", samples=4, tokens=6, in_features=32, out_features=24, ranks=(2, 4, 8, 8))
MINI = replace(CASE, name="mini", ranks=(4, 4), popularity="one_hot", trainable="last")
TRAINING = ("base_only", "packed_eager", "peft_loop", "dmole_loop", "grouped_mm", *cpu_backends())
PROXY = ProxyCase(name="proxy", hidden=16, intermediate=24, layers=1, heads=2, samples=2, tokens=5, vocabulary=32)


@pytest.fixture
def machine() -> Machine:
    return Machine(
        name="a machine", versions="torch x", commit="0123456789ab", shapes=((32, 32, 32),), copy_bytes=2**16
    )


def complaints(benchmark: Benchmark) -> dict[str, list[str]]:
    return {provider.name: list(provider.judge()) for provider in benchmark.providers}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        CASE,
        MINI,
        replace(CASE, name="dense", top=0),
        replace(CASE, name="token_top_1", top=1, level="token"),
        replace(CASE, name="zipf", popularity="zipf"),
        replace(CASE, name="dropout", dropout=0.1),
        replace(CASE, name="decode", samples=1, tokens=1),
    ],
    ids=lambda case: case.name,
)
def test_every_provider_is_correct(case: LoraCase, dtype: torch.dtype) -> None:
    for direction in ("forward", "forward_backward"):
        benchmark = lora_benchmark(case, dtype, direction, 1, TRAINING)  # type: ignore[arg-type]
        assert complaints(benchmark) == {provider.name: [] for provider in benchmark.providers}
        assert len(benchmark.providers) + len(benchmark.refusals) == len(TRAINING)
        for provider in benchmark.providers:
            provider.run()


def test_a_case_that_a_suite_s_generator_built_runs_outside_it() -> None:
    suite = (lora_benchmark(CASE, torch.float32, "forward", 1, (name,)) for name in cpu_backends())
    assert [complaints(benchmark) for benchmark in suite] == [{name: []} for name in cpu_backends()]


def test_peft_takes_one_adapter_a_sample_and_only_in_inference() -> None:
    one = replace(CASE, name="top_1", top=1)
    benchmark = lora_benchmark(one, torch.float32, "forward", 1, ("peft_mixed",))
    assert complaints(benchmark) == {"peft_mixed": []}
    training = lora_benchmark(one, torch.float32, "forward_backward", 1, ("peft_mixed",))
    assert training.refusals == ["peft_mixed: not in this case: it supports inference only"]
    with pytest.raises(CannotTake, match="one adapter a sample"):
        peft_mixed(make_problem(CASE, torch.float32))


def test_a_baseline_that_cannot_run_a_case_gives_the_reason() -> None:
    case = replace(CASE, in_features=33)
    benchmark = lora_benchmark(case, torch.float32, "forward", 1, ("grouped_mm", "packed_eager"))
    assert [provider.name for provider in benchmark.providers] == ["packed_eager"]
    assert benchmark.refusals == [
        "grouped_mm: not in this case: F.grouped_mm needs widths that are multiples of 4 in torch.float32"
    ]


def without_last_expert(problem: LoraProblem) -> Built:
    """A baseline that is faster because it leaves out an expert."""
    gate = problem.inputs.gate.clone()
    gate[..., problem.active[-1]] = 0
    return packed_eager(replace(problem, inputs=replace(problem.inputs, gate=gate)))


def with_wrong_gradient(problem: LoraProblem) -> Built:
    built = packed_eager(problem)
    return replace(built, gradients=lambda grads: {k: 1.2 * v for k, v in built.gradients(grads).items()})


@pytest.mark.parametrize("wrong", [without_last_expert, with_wrong_gradient])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_baseline_is_refused(
    wrong: Callable[[LoraProblem], Built], dtype: torch.dtype, machine: Machine
) -> None:
    providers = ("base_only", "packed_eager", "wrong")
    benchmark = lora_benchmark(CASE, dtype, "forward_backward", 1, providers, table={"wrong": wrong})
    outcome = check_and_time(benchmark, seconds=0, min_rounds=2, memory=False)
    assert set(outcome.wrong) == {"wrong"} and "worst-row error" in outcome.wrong["wrong"][0]
    assert [row.provider for row in outcome.rows(machine)] == ["base_only", "packed_eager"]
    assert outcome.ratio("wrong", "packed_eager") is None
    assert any("WRONG, not timed" in line for line in report(outcome))


def test_a_wrong_norm_is_refused() -> None:
    case = NormCase(samples=2, tokens=5, in_features=8, out_features=6)

    def wrong(x: Tensor, grad: Tensor) -> Tensor:
        return 1.01 * opacus_einsum(x, grad)

    found = complaints(norm_benchmark(case, torch.float32, 1, table={"wrong": wrong}))
    assert [provider for provider, lines in found.items() if lines] == ["wrong"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_router_and_proxy_are_right(dtype: torch.dtype) -> None:
    case = NormCase(samples=2, tokens=5, in_features=70, out_features=66)
    benchmarks = (
        norm_benchmark(case, dtype, 1),
        accumulate_benchmark(case, dtype, 1),
        score_benchmark(ScoreCase(tasks=3, samples=5, features=40, hidden=8), dtype, 1),
        select_benchmark(7, 4, 1),
        pool_benchmark(3, 5, 8, dtype, 1),
        proxy_benchmark(PROXY, dtype, 1),
    )
    for benchmark in benchmarks:
        assert {provider: lines for provider, lines in complaints(benchmark).items() if lines} == {}
        assert any(provider.name.startswith(cpu_backends()) for provider in benchmark.providers)


def test_flops_and_bytes_of_a_case_by_hand() -> None:
    problem = make_problem(replace(CASE, top=1, popularity="one_hot"), torch.bfloat16)
    rows, inputs, outputs, rank = 24, 32, 24, 2  # all samples use expert 0
    assert problem.active == (0,)
    assert problem.base_flops("forward") == 2 * rows * inputs * outputs
    assert problem.added_flops("forward") == 2 * rows * rank * (inputs + outputs)
    assert problem.added_flops("forward_backward") == 3 * problem.added_flops("forward")
    forward = rows * inputs + 2 * rows * outputs + 2 * rows * rank + rank * (inputs + outputs)
    assert problem.added_bytes("forward") == 2 * forward
    assert make_problem(MINI, torch.float32).added_flops("forward_backward") == 2.5 * make_problem(
        MINI, torch.float32
    ).added_flops("forward")


def test_gates_follow_the_case() -> None:
    def gate(**changes: object) -> Tensor:
        return make_problem(replace(CASE, samples=64, **changes), torch.float32).inputs.gate  # type: ignore[arg-type]

    assert torch.equal(gate().sum(-1), torch.full((64,), 2.0))
    assert gate(level="token").shape == (64, 6, 4)
    torch.testing.assert_close(gate(top=0).sum(-1), torch.ones(64))
    assert gate(popularity="one_hot").sum(0).tolist() == [64, 64, 0, 0]
    zipf = gate(popularity="zipf", top=1).sum(0).tolist()
    assert zipf[0] == max(zipf) and sum(zipf) == 64
    with pytest.raises(ValueError, match="top is 5; expected 0"):
        gate(top=5)


def test_rounds_are_interleaved_and_samples_paired() -> None:
    order: list[str] = []
    samples = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, seconds=0, min_rounds=4)
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys("abc", 4)
    # Runs of one name are one sample: its calls are repeated until the clock can tell them.
    blocks = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert len(blocks) > 3 + 4 and set(blocks) == set("abc")
    assert paired_ratio([2.0, 4.0, 30.0], [1.0, 2.0, 1.0]) == 2.0
    assert percentiles_ms([0.001, 0.002, 0.003]) == pytest.approx((1.4, 2.0, 2.6))


def test_peak_memory_counts_what_is_alive_together() -> None:
    x = torch.zeros(256, 1024)  # 1 MiB

    def run() -> Tensor:
        first = x + 1
        second = first + 1
        del first
        return second + 1

    assert peak_memory_mib(run) == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_saves_x_and_s_only(dtype: torch.dtype) -> None:
    problem = make_problem(CASE, dtype)
    built = module_of(cpu_backends()[0])(problem)
    x = problem.inputs.x.detach().requires_grad_()
    weights = (problem.weight, *built.parameters)
    columns = sum(CASE.ranks[e] for e in problem.active)
    kept = saved_for_backward_bytes(lambda: built.forward(x), weights)
    gate = problem.inputs.gate.nbytes
    assert x.nbytes < kept <= x.nbytes + 4 * CASE.rows * columns + gate


def test_run_writes_the_columns_of_the_issue(tmp_path: Path, machine: Machine) -> None:
    assert COLUMNS == (
        "case", "dtype", "direction", "threads", "provider", "p20_ms", "p50_ms", "p80_ms", "peak_memory_mib",
        "peak_fraction", "overhead_over_floor", "machine", "versions", "commit",
    )  # fmt: skip
    providers = ("base_only", "packed_eager", *cpu_backends())
    benchmark = lora_benchmark(CASE, torch.float32, "forward_backward", 1, providers)
    output = tmp_path / "new" / "lora.csv"
    said: list[object] = []
    assert run.run_benchmarks(iter([benchmark]), machine, output, seconds=0, say=said.append)
    rows = {row["provider"]: row for row in read_rows(output)}
    assert set(rows) == {"fastest_linear", "copy_", "base_only", "packed_eager", *cpu_backends()}
    assert rows["base_only"]["overhead_over_floor"] == ""
    assert math.isfinite(float(rows["packed_eager"]["overhead_over_floor"]))
    assert math.isfinite(float(rows["packed_eager"]["peak_fraction"]))
    assert 0 < float(rows["packed_eager"]["peak_memory_mib"]) < 1
    assert {row["commit"] for row in rows.values()} == {"0123456789ab"}
    assert said[0] == "tiny  float32  forward_backward  1 thread(s)"


def test_peak_fraction_and_overhead_by_hand(machine: Machine) -> None:
    def provider(name: str) -> Provider:
        return Provider(name=name, run=lambda: None, judge=lambda: [], flops=1e9)

    benchmark = Benchmark(
        case="c", dtype=torch.float32, direction="forward", threads=1, base="base_only",
        providers=[provider("base_only"), provider("ours")], added_flops=2e8, added_bytes=1e6,
    )  # fmt: skip
    machine._peak[torch.float32, 1] = 1e11  # 2 ms for the added products
    machine._bandwidth[1] = 1e9  # 1 ms for the added bytes
    outcome = Outcome(benchmark=benchmark, samples={"base_only": [0.010] * 3, "ours": [0.015, 0.016, 0.017]}, wrong={})
    base, ours = outcome.rows(machine)
    assert (base.peak_fraction, base.overhead_over_floor) == (pytest.approx(1.0), "")
    assert (ours.peak_fraction, ours.overhead_over_floor) == (pytest.approx(0.625), pytest.approx(3.0))
    assert ours.p50_ms == pytest.approx(16.0)


def test_our_own_wrong_result_fails_the_run(tmp_path: Path, machine: Machine) -> None:
    ours = Provider(name=f"{cpu_backends()[0]}_auto", run=lambda: None, judge=lambda: ["no"], flops=0.0)
    fair = Provider(name="baseline", run=lambda: None, judge=lambda: [], flops=0.0)
    benchmark = Benchmark(case="c", dtype=torch.float32, direction="forward", threads=1, providers=[ours, fair])
    assert not run.run_benchmarks(iter([benchmark]), machine, tmp_path / "a.csv", seconds=0, say=lambda line: None)


def test_the_suite_covers_the_axes() -> None:
    cases = [entry.case for entry in entries()]
    assert len({case.name for case in cases}) == len(cases)
    assert {len(case.ranks) for case in cases} >= {1, 4, 16, 64, 256}
    assert min(case.rows for case in cases) == 1 and max(case.rows for case in cases) == 16384
    assert {case.popularity for case in cases} == {"uniform", "zipf", "one_hot"}
    assert {case.top for case in cases} >= {0, 1, 2}
    assert sum(cases[0].ranks) == 200 and len(cases[0].ranks) == 16


def test_summary_is_one_object_keyed_by_row(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = summary_module.Sizes(
        main=replace(CASE, name="top2"),
        decode_rows=(1, 2),
        decode_widths=(32,),
        expert_counts=(2, 4),
        experts_case=CASE,
        norm_tokens=(3, 300),
        norm_width=16,
        proxy=PROXY,
        router=ScoreCase(tasks=2, samples=3, features=16, hidden=4),
        seconds=0.0,
        min_rounds=2,
    )
    result = json.loads(json.dumps(summary_module.summary(tiny, lambda line: None)))
    assert list(result) == [
        "bf16_top2", "fp32_top2", "decode_bf16", "experts_4_to_256", "saved_for_backward", "grad_norm", "proxy",
        "router_score", "about", "wrong",
    ]  # fmt: skip
    assert result["wrong"] == {}
    for name, ratios in result.items():
        if name not in ("about", "wrong"):
            assert ratios and all(value is not None for value in ratios.values()), name
    assert result["about"]["ours"] == cpu_backends()[0]


def test_tables_are_made_from_the_csv(tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = lora_benchmark(CASE, torch.float32, "forward", 1, ("base_only", "packed_eager"))
    run.run_benchmarks(iter([benchmark]), machine, tmp_path / "lora.csv", seconds=0, say=lambda line: None)
    page = tmp_path / "README.md"
    page.write_text("A\n\n<!-- benchmarks: lora.csv case=tiny -->\nold\n<!-- /benchmarks -->\n")
    assert tables.main([str(page), "--check"]) == 1
    assert tables.main([str(page)]) == 0
    assert tables.main([str(page), "--check"]) == 0
    text = page.read_text()
    assert "| case | dtype | direction | threads | base_only, ms | packed_eager, ms |" in text
    assert "p50. a machine; torch x; commit 0123456789ab." in text and "old" not in text
    with pytest.raises(ValueError, match="has no row for 'case=none'; expected some"):
        tables.table(tmp_path / "lora.csv", ["case=none"])
    with pytest.raises(ValueError, match="filter 'speed=1'; expected column=pattern"):
        tables.table(tmp_path / "lora.csv", ["speed=1"])
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"has columns \['a', 'b'\]; expected"):
        read_rows(tmp_path / "bad.csv")
    page.write_text("<!-- benchmarks: lora.csv -->\n")
    with pytest.raises(ValueError, match="a marker has no partner"):
        tables.filled(page)


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_the_repository_s_own_tables_are_those_of_its_csvs(name: str) -> None:
    page = Path(__file__).parent.parent / name
    assert "<!-- benchmarks: " in page.read_text(encoding="utf-8")
    assert tables.main([str(page), "--check"]) == 0


def test_a_summary_table_has_targets_and_whether_they_were_reached(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    about = {"machine": "m", "versions": "v", "commit": "c"}
    rows = {"fp32_top2": {"ours_over_base": 1.13, "other": 2.0}, "router_score": {"autoencoder_loop_over_ours": 5.0}}
    file.write_text(json.dumps({**rows, "about": about, "wrong": {}}), encoding="utf-8")
    made = tables.summary_table(file)
    assert "| fp32_top2 | ours_over_base | 1.13 | <= 1.12 | no |" in made
    assert "| fp32_top2 | other | 2 |  |  |" in made
    assert "| router_score | autoencoder_loop_over_ours | 5 | >= 5 | yes |" in made


def test_no_row_of_the_summary_is_slower_than_before_the_layer_was_rewritten() -> None:
    """`python -m benchmarks.against_commit OLD_CHECKOUT --output ...`; a repeated measurement replaces the file."""
    path = Path(summary_module.__file__).parent / "results" / "against_6f24d32.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    slow = {row: found["new_over_old"] for row, found in record["rows"].items() if found["new_over_old"] > 1.02}
    assert not slow
    assert {"bf16_top2", "fp32_top2", "experts_256", "proxy_exact", "proxy_sketch", "router_score"} <= set(
        record["rows"]
    )
    assert record["about"]["old"].startswith("6f24d32") and "+" not in record["about"]["new"]


def test_a_training_step_takes_at_most_a_tenth_longer_than_in_the_loop_before() -> None:
    """`python -m mini_cmit.benchmarks.training_step OLD ...`, with the last commit of the loop of our own."""
    path = Path(summary_module.__file__).parent / "results" / "training_step.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert set(rows) == {"seq_ft_bf16", "seq_ft_fp32", "dmole_bf16", "dmole_fp32"}
    assert all(row["ratio"] <= 1.1 for row in rows.values())
