# SPDX-License-Identifier: Apache-2.0
"""A package of somebody else: a method, a metric, a stream and a recipe for dmole."""
