# SPDX-License-Identifier: Apache-2.0
"""
    python -m benchmarks.check_gpu [--output check_gpu]

For the first person with a GPU, from the root of a checkout, in under ten minutes: is every kernel right on it
(`correctness`), does compute-sanitizer find nothing (`sanitizer`), do other launch configurations do better
(`dmole_kernels._tune`, a few of them), and what do the kernels cost beside their rivals (`rivals`, `roofline`)? Writes
summary.json, benchmark.csv, roofline.png and tuned.json; exits with 1 for a wrong result or a sanitizer's complaint.

Every part has a share of the ten minutes and says what it left out. Without a GPU everything but the sanitizer runs in
Triton's interpreter on tiny shapes: that shows that the command works, and its times mean nothing.
"""
