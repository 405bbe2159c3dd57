# SPDX-License-Identifier: Apache-2.0
"""What metrics computed before: `dmole verify` scores older results with it. No new run does."""
