# SPDX-License-Identifier: Apache-2.0
"""Continual multimodal instruction tuning: D-MoLE, its baselines, runs that resume, numbers that can be recomputed.

Entry points: ``dmole.runs.runner.run(RunConfig(...))``, the command ``dmole``, ``dmole.methods`` for your own method.
"""
