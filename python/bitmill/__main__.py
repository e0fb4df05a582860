# SPDX-License-Identifier: Apache-2.0
"""`python -m bitmill` is the `bitmill` command."""

import sys

from .cli import main

sys.exit(main())
