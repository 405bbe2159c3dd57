# SPDX-License-Identifier: Apache-2.0
"""The mini model (weights, stem, image processor, processor) and the tiny one for tests: plain transformers folders."""
