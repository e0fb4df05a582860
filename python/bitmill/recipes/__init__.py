# SPDX-License-Identifier: Apache-2.0
"""Published methods, whole: conversion, losses, schedules. One module a method, imported on request."""
