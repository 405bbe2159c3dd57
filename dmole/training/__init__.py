# SPDX-License-Identifier: Apache-2.0
"""The steps of one stage: TrainingArguments' settings, accelerate, batches, optimizer and schedule, validation."""
