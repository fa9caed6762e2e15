"""AdamW as the GPT papers use it: decay on matrices only, clipping by global norm."""

import tf_keras as keras


@keras.saving.register_keras_serializable(package="gpt_tf")
class AdamW(keras.optimizers.AdamW):
    """Adam with decoupled weight decay on the variables that are matrices.

    Args:
        learning_rate: Step size above 0, or a tf_keras schedule.
        weight_decay: Share of a matrix taken away per unit of learning rate.
        beta_1: Decay of the mean of gradients, in [0, 1).
        beta_2: Decay of the mean of squared gradients, in [0, 1).
        epsilon: Added to the root of the latter.
        global_clipnorm: Largest norm of all gradients together, or None.
        **kwargs: As for `keras.optimizers.AdamW`.

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

    def _use_weight_decay(self, variable):
        return variable.shape.rank >= 2 and super()._use_weight_decay(variable)
