# SPDX-License-Identifier: Apache-2.0
"""Streams of tasks: what they are (`sample`), how they are read and checked (`reading`), the schema (`README.md`)."""

from dmole.data.reading import DataError, read_stream
from dmole.data.sample import Sample, Stream, Task, Turn

__all__ = ["DataError", "Sample", "Stream", "Task", "Turn", "read_stream"]
