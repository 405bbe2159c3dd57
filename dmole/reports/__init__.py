# SPDX-License-Identifier: Apache-2.0
"""From results on disk to tables, pictures, comparisons, and the check that every number can be recomputed."""
