# SPDX-License-Identifier: Apache-2.0
"""Programs that train: `python -m bitmill.recipes.scripts.NAME --help`."""
