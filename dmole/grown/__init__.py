# SPDX-License-Identifier: Apache-2.0
"""The model that a run leaves: written, sealed, read again, and used."""
