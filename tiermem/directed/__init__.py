"""Directed mode: one planner beside an engine's scheduler, executors on all of its ranks.

`director` decides, `rank` carries out, `orders` is what travels between them.
"""
