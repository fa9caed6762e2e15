"""Settings: how each is stated once, and checked.

`configuration` is the base of every configuration class (name, type, default, range and
description of a field stand in the class; constructor, checks, JSON and the command
line's options follow from them). `arguments` checks single arguments of functions, on a
device too, without pydantic. Imports `gpt_tf.errors` only. Start with `configuration`.
"""
