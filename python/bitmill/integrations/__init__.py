# SPDX-License-Identifier: Apache-2.0
"""Hosts: models of other libraries, each in a module of its own that is imported on request."""
