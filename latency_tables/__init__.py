"""Latency, measured once per device and looked up for every proposal.

`build` measures a table, `predict` adds its entries up for a schedule, `validate` states the error of doing so.
"""
