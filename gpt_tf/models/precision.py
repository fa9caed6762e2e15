"""In which precision layers compute: Keras's global policy, for a while."""

import contextlib

import tf_keras as keras


@contextlib.contextmanager
def precision(name):
    """Let what is built in this block have a dtype policy, and then be as before.

    Args:
        name: Of the policy: `"float32"`, `"mixed_bfloat16"` or `"mixed_float16"`.
    """
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(name)
    try:
        yield
    finally:
        keras.mixed_precision.set_global_policy(before)
