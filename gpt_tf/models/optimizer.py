"""AdamW as the GPT papers use it, in one pass over memory per variable."""

import tensorflow as tf
import tf_keras as keras

from gpt_tf.settings import arguments


@keras.saving.register_keras_serializable(package="gpt_tf")
class AdamW(keras.optimizers.AdamW):
    """Adam with decoupled weight decay on matrices and clipping by global norm.

    The update of a variable is TensorFlow's fused Adam kernel, which reads and
    writes each number once; composed of single operations it takes twice the
    memory traffic, and with it twice the time. The gradients are scaled down only
    where their norm asks for it.

    Args:
        learning_rate: Step size above 0, or a tf_keras schedule.
        weight_decay: Share of a matrix taken away per unit of learning rate, at
            least 0. Vectors (biases, gains) are not decayed.
        beta_1: Decay of the mean of gradients, in [0, 1).
        beta_2: Decay of the mean of squared gradients, in [0, 1).
        epsilon: Added to the root of the latter.
        global_clipnorm: Largest norm of all gradients together, or None.
        **kwargs: As for `keras.optimizers.AdamW`; `amsgrad` is computed by Keras.

    Reference: Loshchilov and Hutter, "Decoupled Weight Decay Regularization",
    arXiv:1711.05101.
    """

    def __init__(
        self,
        learning_rate=3e-4,
        weight_decay=0.1,
        beta_1=0.9,
        beta_2=0.95,
        epsilon=1e-8,
        global_clipnorm=1.0,
        jit_compile=False,
        name="AdamW",
        **kwargs,
    ):
        if not callable(learning_rate) and not tf.is_tensor(learning_rate):
            learning_rate = arguments.number("learning_rate", learning_rate, least=0)
        weight_decay = arguments.number("weight_decay", weight_decay, least=0)
        beta_1 = arguments.number("beta_1", beta_1, least=0, below=1)
        beta_2 = arguments.number("beta_2", beta_2, least=0, below=1)
        epsilon = arguments.number("epsilon", epsilon, least=0)
        global_clipnorm = arguments.number(
            "global_clipnorm", global_clipnorm, least=0, or_none=True
        )
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            global_clipnorm=global_clipnorm,
            jit_compile=jit_compile,
            name=name,
            **kwargs,
        )

    def _clip_gradients(self, grads):
        if not self.global_clipnorm or self.clipnorm or self.clipvalue:
            return super()._clip_gradients(grads)
        grads = [tf.convert_to_tensor(grad) for grad in grads]
        norm = tf.linalg.global_norm(grads)
        limit = tf.cast(self.global_clipnorm, norm.dtype)
        if self._mesh:  # DTensor has no branches
            share = tf.where(norm <= limit, tf.ones_like(norm), limit / norm)
            return [grad * share for grad in grads]
        return tf.cond(
            norm <= limit,
            lambda: [tf.identity(grad) for grad in grads],
            # A norm that is not finite makes all gradients NaN, as in Keras.
            lambda: [grad * (limit / norm) for grad in grads],
        )

    def _apply_weight_decay(self, variables):
        """Nothing: the decay belongs to `update_step`."""

    def _distributed_apply_gradients_fn(self, distribution, grads_and_vars, **kwargs):
        self._share_factors()
        return super()._distributed_apply_gradients_fn(
            distribution, grads_and_vars, **kwargs
        )

    def _internal_apply_gradients(self, grads_and_vars):
        if self._mesh:  # then the method above is not called
            self._share_factors()
        return super()._internal_apply_gradients(grads_and_vars)

    def _share_factors(self):
        """Compute what all variables share, once a step and not once a variable."""
        step = tf.cast(self.iterations + 1, tf.float32)
        rate = tf.cast(self.learning_rate, tf.float32)
        decay = 1.0 - rate * (self.weight_decay or 0.0)
        self._shared = (
            rate,
            tf.pow(tf.cast(self.beta_1, tf.float32), step),
            tf.pow(tf.cast(self.beta_2, tf.float32), step),
            decay,
        )

    def update_step(self, gradient, variable):
        """Update one variable with its gradient."""
        rate, beta_1_power, beta_2_power, decay = self._shared
        if variable.shape.rank >= 2 and self._use_weight_decay(variable):
            # Not before the gradient is there: a step that fails moves nothing.
            with tf.control_dependencies([tf.convert_to_tensor(gradient)]):
                variable.assign(variable * tf.cast(decay, variable.dtype))
        if self.amsgrad:
            return super().update_step(gradient, variable)
        index = self._index_dict[self._var_key(variable)]
        first, second = self._momentums[index], self._velocities[index]
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=first.handle,
            v=second.handle,
            beta1_power=tf.cast(beta_1_power, variable.dtype),
            beta2_power=tf.cast(beta_2_power, variable.dtype),
            lr=tf.cast(rate, variable.dtype),
            beta1=tf.cast(self.beta_1, variable.dtype),
            beta2=tf.cast(self.beta_2, variable.dtype),
            epsilon=tf.cast(self.epsilon, variable.dtype),
            grad=tf.convert_to_tensor(gradient),
        )
