# SPDX-License-Identifier: Apache-2.0
"""Continual multimodal instruction tuning: D-MoLE, its baselines, runs that resume, and numbers that can be recomputed.

Entry points: ``dmole.runner.run(RunConfig(...))``, the command ``dmole``, and ``dmole.methods`` for a method of your own.
"""
