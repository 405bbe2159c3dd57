# SPDX-License-Identifier: Apache-2.0
"""Models of transformers' own classes, and where experts sit in them."""
