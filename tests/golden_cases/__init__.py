# SPDX-License-Identifier: Apache-2.0
"""One module a published system: comparisons of its golden vectors with the public API, by case."""
