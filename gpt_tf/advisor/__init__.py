"""Choosing among files: constraints, ranking, and bounds before measuring.

It decides and measures nothing. `constraints` are the reader's limits, `candidates` the
measured files, `ranking` the rule, `estimate` and `forecast` what can be said before
anything is measured. Imports `evaluation`'s schema and `export`'s contract. Start with
`ranking`.
"""
