# SPDX-License-Identifier: Apache-2.0
"""Timings of dmole_kernels against its rivals: correct first, interleaved in one process, a CSV row with its machine.

python -m benchmarks.run --suite multi_lora --output benchmarks/results/multi_lora.csv
python -m benchmarks.headline
python -m benchmarks.tables README.md
"""
