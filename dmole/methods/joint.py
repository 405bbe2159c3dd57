# SPDX-License-Identifier: Apache-2.0
"""Joint: one LoRA on the union of all tasks, with as many steps as the others take over all their stages.

Up to the last batch of each epoch, and only while `training.epochs_of` is empty: the union trains
`training.num_train_epochs`.

Its matrix has row 0 and the last row alone, so AVG and BWT are undefined.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dmole.data.sample import joined
from dmole.methods._single_adapter import SingleAdapter
from dmole.methods.base import Stage

if TYPE_CHECKING:
    from dmole.data.sample import Stream

UNION = "joint"


class Joint(SingleAdapter):
    """One stage whose training set is every task's training set."""

    name: ClassVar[str] = "joint"

    def stages(self, stream: Stream) -> list[Stage]:
        # A stage trains on a Task; the union's metric is never used, because tests go by the stream's own tasks.
        first = stream.tasks[0]
        union = type(first)(
            name=UNION,
            metric=first.metric,
            train=joined(task.train for task in stream.tasks),
            validation=joined(task.validation for task in stream.tasks),
            test=(),
        )
        every = tuple(task.name for task in stream.tasks)
        return [Stage(index=1, row=len(stream.tasks), task=union, evaluates=every)]
