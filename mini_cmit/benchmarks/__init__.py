# SPDX-License-Identifier: Apache-2.0
"""The application's speed on the mini benchmark, from a checkout: whole runs by backend, steps against another commit.

They take `benchmarks` for machines and rows, which is not installed.
"""
