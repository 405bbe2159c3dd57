# SPDX-License-Identifier: Apache-2.0
"""
    python -m benchmarks.check_gpu [--output check_gpu]

Checks this package on the GPU at hand, from the root of a checkout, in under ten minutes: correctness of every kernel
(`correctness`), compute-sanitizer (`sanitizer`), a few other launch configurations (`dmole_kernels._tune`), and times
of the kernels and their baselines (`timed_cases`, `roofline`). Writes summary.json, benchmark.csv, roofline.png and
tuned.json; exits with 1 for a wrong result or an error that the sanitizer found.

Every step has a time budget and reports what it left out. Without a GPU everything but the sanitizer runs in Triton's
interpreter on tiny shapes: this shows that the command works; its times mean nothing.
"""
