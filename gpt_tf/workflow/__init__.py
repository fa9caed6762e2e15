"""The whole way as one command: `optimize`.

The only room that composes the three methods. `steps` keeps what is done while its
inputs stay, `optimization` lists the steps, `config` holds the settings. Imports every
room but `cli`. Start with `optimization`.
"""
