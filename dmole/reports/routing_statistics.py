# SPDX-License-Identifier: Apache-2.0
"""How the router served the samples of one row of the matrix, from their routes."""

from collections.abc import Collection, Iterable
from typing import Protocol


class Routed(Protocol):
    """A prediction. `route` names the experts' tasks, best first; () is the base model, None an unrouted method."""

    @property
    def task(self) -> str: ...
    @property
    def route(self) -> tuple[str, ...] | None: ...


def routing_statistics(predictions: Iterable[Routed], learned: Collection[str]) -> dict[str, float]:
    """Shares of the samples of one row; {} for an unrouted method.

    samples                   how many samples of learned tasks there are
    routing_accuracy          those whose first choice is their own task, as a share
    routing_accuracy_any      those whose own task is among those chosen
    base_model_share          those that got no expert
    unseen_base_model_share   samples of tasks not learned yet that got no expert (absent after the last stage)
    """
    routed = [(prediction.task, prediction.route) for prediction in predictions if prediction.route is not None]
    if not routed:
        return {}
    known = [(task, route) for task, route in routed if task in learned]
    unseen = [route for task, route in routed if task not in learned]
    shares: dict[str, float] = {"samples": len(known)}
    if known:
        shares["routing_accuracy"] = sum(route[:1] == (task,) for task, route in known) / len(known)
        shares["routing_accuracy_any"] = sum(task in route for task, route in known) / len(known)
        shares["base_model_share"] = sum(route == () for _, route in known) / len(known)
    if unseen:
        shares["unseen_base_model_share"] = sum(route == () for route in unseen) / len(unseen)
    return shares
