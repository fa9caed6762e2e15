"""What a GPT computes on the way to its logits, for losses that compare more."""

import contextlib

from gpt_tf.distillation.losses import Outputs
from gpt_tf.errors import InputError
from gpt_tf.models.cached_forward import parts_of
from gpt_tf.models.layers import observed


def outputs_of(model, tokens, wants=("logits",), training=False):
    """Run a GPT and return what losses want to compare.

    Args:
        model: A `GPTModel`, or a `QuantizationAwareGPT`.
        tokens: `(B, T)` int32.
        wants: Any of `"logits"`, `"hidden_states"` and `"attentions"`.
        training: Whether dropout is on.

    Returns:
        `Outputs`: logits `(B, T, V)`; if wanted, hidden states, `L + 1` of
        `(B, T, C)`, and attention, `L` of `(B, H, T, T)`.

    Raises:
        InputError: The model's attention cannot be seen.
    """
    if set(wants) <= {"logits"}:
        return Outputs(model(tokens, training=training))
    parts = parts_of(model)
    attentions, watching = [], contextlib.nullcontext()
    if "attentions" in wants:
        watching = observed(
            parts.blocks,
            lambda layer, name, x: attentions.append(x),
            ("probabilities_activation",),
        )
    with watching:
        x, table = parts.embed(tokens, training)
        hidden = [x]
        for block in parts.blocks:
            x = block(x, training=training)
            hidden.append(x)
        logits = parts.score(x, table, training)
    if "attentions" in wants and len(attentions) != len(parts.blocks):
        raise InputError(
            "Attention transfer expects blocks that show their attention. Received: "
            f"{type(model).__name__} {model.name!r}. Distil a float student first, or "
            "compare hidden states."
        )
    return Outputs(logits, tuple(hidden), tuple(attentions))
