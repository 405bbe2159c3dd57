# SPDX-License-Identifier: Apache-2.0
"""From the matrix A[t][i] to one number, by the three conventions of the field; every function names its own.

A has N + 1 rows and N columns: A[t][i] is the score on task i after stage t, row 0 is the model before any training,
columns stand in the order of learning (column i is learned in stage i), NaN marks a cell that was not measured.
Formulas count tasks from 1, as the papers do; arrays count from 0.

- D-MoLE (ICML 2025): AVG_i = mean_{t=1..N} A[t][i], Last_i = A[N][i], BWT_i = 1/(N-i) sum_{t>i} (A[t][i] - A[i][i]);
- CoIN, BranchLoRA: ACC = mean_i A[N][i], MAA = 1/N sum_j 1/j sum_{i<=j} A[j][i], BWT = 1/N sum_i (A[N][i] - A[i][i]);
- GEM, Mammoth, Avalanche: MFN = mean_i A[N][i], MFT = mean_i A[i][i], BWT = 1/(N-1) sum_{i<N} (A[N][i] - A[i][i]).

The three BWTs differ on the same matrix: D-MoLE averages over all later stages, the others look at the last one only,
and CoIN divides by N although the last task cannot be forgotten.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Array = NDArray[np.float64]


def check_matrix(matrix: Array) -> Array:
    """`matrix` as float64 [N + 1, N]; ValueError for another shape."""
    array = np.asarray(matrix, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] < 1 or array.shape[0] != array.shape[1] + 1:
        raise ValueError(
            f"matrix has shape {list(array.shape)}; expected [N + 1, N]: one row per stage, the untrained model first, "
            "one column per task. Add the missing rows as NaN."
        )
    return array


def dmole_average_per_task(matrix: Array) -> Array:
    """[N] `AVG_i = 1/N sum_{t=1..N} A[t][i]` over ALL stages, tasks not yet learned included (D-MoLE Eq. 16)."""
    return np.asarray(check_matrix(matrix)[1:].mean(axis=0), dtype=np.float64)


def dmole_last_per_task(matrix: Array) -> Array:
    """[N] `Last_i = A[N][i]` (D-MoLE Eq. 17)."""
    return np.asarray(check_matrix(matrix)[-1].copy(), dtype=np.float64)


def dmole_backward_transfer_per_task(matrix: Array) -> Array:
    """[N] `BWT_i = 1/(N-i) sum_{t>i} (A[t][i] - A[i][i])`; NaN, undefined, for the last task (D-MoLE Eq. 18)."""
    array = check_matrix(matrix)
    n = array.shape[1]
    transfer = np.full(n, np.nan)
    for i in range(n - 1):
        transfer[i] = np.mean(array[i + 2 :, i] - array[i + 1, i])
    return transfer


def dmole_average(matrix: Array) -> float:
    """Mean over tasks of `dmole_average_per_task`: the AVG of D-MoLE's tables."""
    return float(np.mean(dmole_average_per_task(matrix)))


def dmole_last(matrix: Array) -> float:
    """Mean over tasks of `A[N][i]`: the Last of D-MoLE's tables (= CoIN's ACC = MFN)."""
    return float(np.mean(dmole_last_per_task(matrix)))


def dmole_backward_transfer(matrix: Array) -> float:
    """Mean over the first N - 1 tasks of `dmole_backward_transfer_per_task`; NaN for a single task."""
    per_task = dmole_backward_transfer_per_task(matrix)[:-1]
    return float(np.mean(per_task)) if len(per_task) else float("nan")


def coin_accuracy(matrix: Array) -> float:
    """`ACC = 1/N sum_i A[N][i]` (CoIN, BranchLoRA)."""
    return dmole_last(matrix)


def coin_mean_average_accuracy(matrix: Array) -> float:
    """`MAA = 1/N sum_{j=1..N} 1/j sum_{i<=j} A[j][i]`: only tasks already learned count (CoIN, BranchLoRA)."""
    array = check_matrix(matrix)
    return float(np.mean([np.mean(array[j, :j]) for j in range(1, array.shape[0])]))


def coin_backward_transfer(matrix: Array) -> float:
    """`BWT = 1/N sum_{i=1..N} (A[N][i] - A[i][i])`: divided by N, the last task's zero included (CoIN, BranchLoRA)."""
    array = check_matrix(matrix)
    return float(np.mean(array[-1] - np.diagonal(array[1:])))


def gem_backward_transfer(matrix: Array) -> float:
    """`BWT = 1/(N-1) sum_{i<N} (A[N][i] - A[i][i])` (GEM, Mammoth, Avalanche); NaN for a single task."""
    array = check_matrix(matrix)
    differences = (array[-1] - np.diagonal(array[1:]))[:-1]
    return float(np.mean(differences)) if len(differences) else float("nan")


def forward_transfer(matrix: Array) -> float:
    """`FWT = mean_{i>1} (A[i-1][i] - A[0][i])`: what earlier tasks did for a later one; NaN for a single task."""
    array = check_matrix(matrix)
    n = array.shape[1]
    return float(np.mean([array[i, i] - array[0, i] for i in range(1, n)])) if n > 1 else float("nan")


def mean_first(matrix: Array) -> float:
    """`MFT = mean_i A[i][i]`: each task right after it was learned (the mean diagonal)."""
    return float(np.mean(np.diagonal(check_matrix(matrix)[1:])))


def mean_final(matrix: Array) -> float:
    """`MFN = mean_i A[N][i]`: the mean last row (= Last = ACC)."""
    return dmole_last(matrix)


@dataclass(frozen=True, kw_only=True)
class Aggregates:
    """AVG, Last and BWT of a run in D-MoLE's convention; None where the method's protocol does not define it."""

    avg: float | None
    last: float | None
    bwt: float | None


def aggregates(matrix: Array, final_rows: Sequence[int] | None = None) -> Aggregates:
    """AVG, Last, BWT of any run; None where a cell that the number needs was not measured.

    With `final_rows` [N], the row of each task's final score in the method's protocol
    (`dmole.runs.evaluation.final_rows`): Last is the mean of `A[final_rows[i]][i]`, AVG and BWT are Eq. 16 and 18.

    Without it, for runs that did not store it, the cells that were measured decide:

    - every row after training is complete (the sequential methods): Eq. 16-18;
    - only row N is complete (Joint: one stage on the union): Last = its mean, the others None;
    - only the diagonal is complete (Finetune: each task from the base): Last = mean diagonal, the others None;
    - only row 0 is complete (Zero-shot): Last = its mean, the others None;
    - anything else (a run that has not finished): all None.
    """
    array = check_matrix(matrix)
    if final_rows is not None:
        avg, bwt = dmole_average(array), dmole_backward_transfer(array)
        last = float(np.mean(array[list(final_rows), np.arange(array.shape[1])]))
        # A mean over a cell that was not measured is NaN.
        return Aggregates(
            avg=None if np.isnan(avg) else avg,
            last=None if np.isnan(last) else last,
            bwt=None if np.isnan(bwt) else bwt,
        )
    if not np.isnan(array[1:]).any():
        bwt = dmole_backward_transfer(array)
        return Aggregates(avg=dmole_average(array), last=dmole_last(array), bwt=None if np.isnan(bwt) else bwt)
    trained = ~np.isnan(array[1:])
    n = array.shape[1]
    only_last_row, only_diagonal = np.zeros((n, n), dtype=bool), np.eye(n, dtype=bool)
    only_last_row[-1] = True
    if (trained == only_last_row).all():
        return Aggregates(avg=None, last=dmole_last(array), bwt=None)
    if (trained == only_diagonal).all():
        return Aggregates(avg=None, last=mean_first(array), bwt=None)
    if not trained.any() and not np.isnan(array[0]).any():
        return Aggregates(avg=None, last=float(np.mean(array[0])), bwt=None)
    return Aggregates(avg=None, last=None, bwt=None)


def other_conventions(matrix: Array) -> dict[str, float]:
    """The other conventions' numbers by names that say whose they are; {} unless all rows after training are complete.

    FWT needs row 0 too and is left out where that was not measured.
    """
    array = check_matrix(matrix)
    if np.isnan(array[1:]).any():
        return {}
    named = {
        "CoIN ACC": coin_accuracy(array),
        "CoIN MAA": coin_mean_average_accuracy(array),
        "CoIN BWT (over N)": coin_backward_transfer(array),
        "GEM BWT (over N-1)": gem_backward_transfer(array),
        "FWT": forward_transfer(array),
        "MFT": mean_first(array),
        "MFN": mean_final(array),
    }
    return {name: value for name, value in named.items() if not np.isnan(value)}


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with a confidence interval."""

    mean: float
    low: float
    high: float
    level: float
    count: int
    """How many units (seeds, or test samples) the interval is over."""

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def paired_t_interval(differences: Sequence[float], *, level: float = 0.95) -> Interval:
    """`mean(d) +- t_{n-1} * std(d) / sqrt(n)` of per-seed differences d (Student's t, two-sided).

    It answers "would another seed say the same", and assumes the differences are roughly normal: with three seeds the
    factor t_2 is 4.30, so only clear effects pass. Needs two differences or more.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or len(d) < 2:
        raise ValueError(
            f"differences has {d.size} entries; expected at least 2, one per seed. Run more seeds, or use the "
            "bootstrap over test samples."
        )
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a number in (0, 1), such as 0.95.")
    if not np.isfinite(d).all():
        raise ValueError(f"differences is {d.tolist()}; expected finite numbers. Leave unfinished runs out.")
    half = float(stdtrit(len(d) - 1, 0.5 + level / 2)) * float(d.std(ddof=1)) / float(np.sqrt(len(d)))
    mean = float(d.mean())
    return Interval(mean=mean, low=mean - half, high=mean + half, level=level, count=len(d))


def paired_bootstrap(
    differences: Sequence[Array], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile interval of `mean_i mean_s d[i][s]` under resampling of the test samples s inside each task i.

    `differences[i]` holds, for each test sample of task i, what the first method scored there minus what the second
    scored there (for several seeds: the mean over seeds). Because every aggregate is linear in the per-sample scores,
    AVG and BWT are treated by giving their per-sample contributions (`per_sample_contributions`). It answers "would
    another test set say the same" for these trained models; it knows nothing of the spread over seeds.

    CIDEr's word weights stay those of the full test split while samples are resampled.
    """
    tasks = [np.asarray(d, dtype=np.float64) for d in differences]
    if not tasks or any(d.ndim != 1 or len(d) == 0 or not np.isfinite(d).all() for d in tasks):
        raise ValueError(
            f"differences has tasks of shapes {[list(d.shape) for d in tasks]}; expected at least one task, each a "
            "non-empty list of finite numbers. Leave out tasks without a score."
        )
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level is {level} and resamples is {resamples}; expected a level in (0, 1) and 1 or more.")
    generator = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for d in tasks:
        # One multinomial draw per resample equals drawing len(d) samples with replacement, without the index array.
        weights = generator.multinomial(len(d), np.full(len(d), 1 / len(d)), size=resamples) / len(d)
        means += weights @ d / len(tasks)
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    mean = float(np.mean([d.mean() for d in tasks]))
    return Interval(mean=mean, low=float(low), high=float(high), level=level, count=sum(len(d) for d in tasks))


def per_sample_contributions(scores: Array, stage_learned: int) -> dict[str, Array]:
    """What each test sample of ONE task adds to AVG_i, Last_i and BWT_i (D-MoLE's convention).

    scores: [N + 1, S], the points of each of the S test samples after each stage (row 0 untrained).
    stage_learned: i, from 1. The mean over S of each returned [S] array is the task's AVG_i, Last_i, BWT_i; BWT is
    absent for the last task.
    """
    array = np.asarray(scores, dtype=np.float64)
    n = array.shape[0] - 1
    if array.ndim != 2 or not 1 <= stage_learned <= n:
        raise ValueError(
            f"scores has shape {list(array.shape)} and stage_learned is {stage_learned}; expected [N + 1, S] and a "
            "stage from 1 to N. Add the untrained model's row."
        )
    contributions = {"AVG": array[1:].mean(axis=0), "Last": array[-1].copy()}
    if stage_learned < n:
        contributions["BWT"] = (array[stage_learned + 1 :] - array[stage_learned]).mean(axis=0)
    return contributions
