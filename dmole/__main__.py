# SPDX-License-Identifier: Apache-2.0
"""`python -m dmole` is the command `dmole`."""

from dmole.cli import main

if __name__ == "__main__":
    main()
