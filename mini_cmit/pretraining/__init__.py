# SPDX-License-Identifier: Apache-2.0
"""How the mini benchmark's base model was made: procedural scenes, entities no task uses, one training script."""
