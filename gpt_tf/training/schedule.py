"""The learning rate over the steps of a run."""

import math

import tensorflow as tf
import tf_keras as keras


@keras.saving.register_keras_serializable(package="gpt_tf")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises linearly and then falls along a cosine.

    Args:
        peak: Largest learning rate.
        final: Learning rate at `total_steps` and after.
        warmup_steps: Steps of the rise.
        total_steps: Steps of the whole run.

    Reference: Loshchilov and Hutter, "SGDR", arXiv:1608.03983.
    """

    def __init__(self, peak, final, warmup_steps, total_steps):
        self.peak = peak
        self.final = final
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps

    def __call__(self, step):
        step = tf.cast(step, tf.float32)
        rise = (step + 1.0) / max(1, self.warmup_steps)
        span = max(1, self.total_steps - self.warmup_steps)
        done = tf.clip_by_value((step - self.warmup_steps) / span, 0.0, 1.0)
        fall = self.final / self.peak + (1.0 - self.final / self.peak) * 0.5 * (
            1.0 + tf.cos(math.pi * done)
        )
        return self.peak * tf.where(step < self.warmup_steps, rise, fall)

    def get_config(self):
        return {
            "peak": self.peak,
            "final": self.final,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
        }
