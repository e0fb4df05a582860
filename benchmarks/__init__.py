# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: each verifies before it times, interleaves the variants, and prints ratios against the strongest."""
