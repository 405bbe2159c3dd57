# SPDX-License-Identifier: Apache-2.0
"""Choosing an order and a size of a stream."""

from pathlib import Path

import pytest

from dmole.data import Sample, Stream, Task


def sample(name: str) -> Sample:
    return Sample(id=name, images=(Path("/none.png"),), instruction="?", answers=("x",))


def task(name: str, metric: str = "exact_match", count: int = 20) -> Task:
    splits = {
        split: tuple(sample(f"{split}{i:03d}") for i in range(count)) for split in ("train", "validation", "test")
    }
    return Task(name=name, metric=metric, **splits)


STREAM = Stream(name="s", tasks=(task("a"), task("b", "cider"), task("c")))


def test_reorder() -> None:
    assert STREAM.reorder(["c", "a", "b"]).task_names == ("c", "a", "b")
    with pytest.raises(
        ValueError,
        match=r"order is c, a, d; expected every task of stream 's' once \(missing: b; unknown: d; repeated: none\)",
    ):
        STREAM.reorder(["c", "a", "d"])
    with pytest.raises(ValueError, match=r"missing: none; unknown: none; repeated: a"):
        STREAM.reorder(["a", "b", "c", "a"])


def test_task_by_name() -> None:
    assert STREAM.task("b").metric == "cider"
    with pytest.raises(ValueError, match="task is 'd'; stream 's' has a, b, c"):
        STREAM.task("d")


def test_limit_keeps_order_and_nests() -> None:
    small, large = STREAM.limit(train=5, test=4), STREAM.limit(train=11, test=4)
    for few, many, full in zip(small.tasks, large.tasks, STREAM.tasks, strict=True):
        assert len(few.train) == 5 and len(few.test) == 4 and few.validation == full.validation
        assert set(few.train) < set(many.train)
        assert list(few.train) == [s for s in full.train if s in few.train]
    # Not simply the first ones: files are often sorted by answer.
    assert small.tasks[0].train != STREAM.tasks[0].train[:5]
    assert STREAM.limit() == STREAM and STREAM.limit(train=1000) == STREAM
    assert STREAM.limit(validation=0).tasks[0].validation == ()


def test_limits_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="train limit is 1; expected at least 2, or None for all"):
        STREAM.limit(train=1)
    with pytest.raises(ValueError, match="test limit is 0; expected at least 1"):
        STREAM.limit(test=0)
    with pytest.raises(
        ValueError, match="test limit is 1; task 'b' is scored by cider, which needs at least 2 test samples"
    ):
        STREAM.limit(test=1)
