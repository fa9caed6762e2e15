"""Choosing among files: constraints, ranking, and bounds before measuring.

It decides and measures nothing. `constraints` are the user's limits, `candidates` the
measured files, `ranking` the rule, `estimate` what sizes say before anything is
measured. Imports `evaluation`'s schema and `export`'s contract. Start with `ranking`.
"""
