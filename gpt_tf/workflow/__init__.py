"""The whole way as one command: `optimize`.

The only room that composes the three methods. `config` holds the settings, `plan` what
is to be made, `optimization` a function for each step, and `steps` keeps what is done
while its inputs stay. Imports every room but `cli`. Start with `optimization`.
"""
