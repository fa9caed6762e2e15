"""What people see of the results: one page, pictures, tables.

It shows and computes nothing. `page` is the report of `optimize`, `pictures` its plots,
`explanations` the page of one explanation, `latency_tables` the terminal's tables.
Imports `advisor`, `explain` and `evaluation`'s schema. Start with `page`.
"""
