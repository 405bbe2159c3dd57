# SPDX-License-Identifier: Apache-2.0
"""The register of experts: JSON in and out, the allocation table, refused duplicates."""

import json

import pytest

from dmole.methods.dmole.expert_pool import ExpertPool, Placement, expert_name


def placement(task: str, **changes: object) -> Placement:
    values: dict[str, object] = {
        "task": task,
        "expert": expert_name(1, task),
        "rank": 8,
        "alpha": 16.0,
        "linears": {"vision": ("v.0.q",), "language": ("l.0.q", "l.1.q")},
        "budgets": {"vision": 1, "language": 2},
        "module_scores": {"vision": 0.5, "language": 2.0},
        "scores": {"vision": {"v.0.q": 0.5}, "language": {"l.0.q": 1.0, "l.1.q": 1.0}},
        "neighbours": {"": 3},
    }
    return Placement(**{**values, **changes})  # type: ignore[arg-type]


def test_json_round_trip() -> None:
    pool = ExpertPool()
    pool.add(placement("maps"))
    pool.add(placement("charts", linears={"vision": ("v.1.q",), "language": ("l.0.q",)}))
    again = ExpertPool.from_json(json.loads(json.dumps(pool.to_json())))
    assert list(again) == list(pool)
    assert again.tasks == ("maps", "charts")
    assert again["charts"].all_linears == ("v.1.q", "l.0.q")


def test_names_are_module_names() -> None:
    assert expert_name(3, "VQA 2.0") == "t03_VQA_2_0"
    assert expert_name(1, "a.b") != expert_name(2, "a_b")


def test_duplicates_and_unknown_tasks_are_refused() -> None:
    pool = ExpertPool()
    pool.add(placement("maps"))
    with pytest.raises(ValueError, match="task: got 'maps', which has experts already"):
        pool.add(placement("maps"))
    with pytest.raises(ValueError, match="expert: got 't01_maps', which is taken"):
        pool.add(placement("other", expert="t01_maps"))
    with pytest.raises(ValueError, match=r"task: got 'charts', which has no expert; expected one of \('maps',\)"):
        pool["charts"]
    assert pool.remove("maps").task == "maps"
    assert len(pool) == 0 and "maps" not in pool
