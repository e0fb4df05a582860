# SPDX-License-Identifier: Apache-2.0
"""`bitmill bench`: packed layers against nn.Linear (`layers`), whole models (`models`) and decoding (`language`)."""
