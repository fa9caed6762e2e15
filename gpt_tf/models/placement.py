"""Where a model's layers stand and how its step is computed, if not all in one place.

`GPTModel` asks for a plan while it is built. There is one inside the scope of a
`gpt_tf.parallel.pipeline.Pipeline`, which then also computes the model's steps.
"""

import contextlib
import contextvars

_PLANNER = contextvars.ContextVar("planner", default=None)


class OnePlace:
    """The plan of a model that is computed as one."""

    is_divided = False

    def at(self, layer_name):
        """Return a context in which a layer of this name is built."""
        return contextlib.nullcontext()


@contextlib.contextmanager
def planned_by(planner):
    """Let models that are built in this block be placed by a planner.

    Args:
        planner: Function of a model's sizes that returns a plan, with `is_divided`,
            `at(layer_name)`, and what `GPTModel` calls in the place of its own
            `compile`, `train_step`, `test_step`, `logits` and `forward_cached`.
    """
    token = _PLANNER.set(planner)
    try:
        yield
    finally:
        _PLANNER.reset(token)


def plan_for(sizes):
    """Return the plan for a model of these sizes."""
    planner = _PLANNER.get()
    return OnePlace() if planner is None else planner(sizes)


def device_of(model):
    """Return the device of a model's weights, None where they are on several.

    A compiled function reads the variables of the device that it is called on.
    """
    devices = {variable.device for variable in model.weights}
    return devices.pop() if len(devices) == 1 else None
