"""What people see of the results: one page, plots, tables.

It shows and computes nothing. `render` makes the report of `optimize` from `templates/`
and `report.css`; `plots` draws, `tables` writes to the terminal, `explanations` shows
one explanation in all three ways. A new column of the report is a line in its template.
Imports `advisor`, `explain` and `evaluation`'s schema. Start with `render`.
"""
