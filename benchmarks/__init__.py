# SPDX-License-Identifier: Apache-2.0
"""Timings of dmole_kernels and its baselines: checked first, interleaved in one process, one CSV row per measurement.

python -m benchmarks.run --suite multi_lora --output benchmarks/results/multi_lora.csv
python -m benchmarks.summary
python -m benchmarks.tables README.md
"""
