# SPDX-License-Identifier: Apache-2.0
"""A run from its configuration to its files: plan, cost, stages, checkpoints, evaluation, what it says meanwhile."""
