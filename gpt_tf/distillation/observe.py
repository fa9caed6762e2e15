"""What a GPT computes on the way to its logits, for losses that compare more."""

import contextlib

from gpt_tf.distillation.losses import Outputs
from gpt_tf.errors import InputError
from gpt_tf.models.decoding import parts_of


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
    attentions = []
    with contextlib.ExitStack() as stack:
        if "attentions" in wants:
            for block in parts.blocks:
                stack.enter_context(_recording(block, attentions))
        outputs = parts.embedding(tokens, training=training)
        x, table = outputs if isinstance(outputs, (list, tuple)) else (outputs, None)
        hidden = [x]
        for block in parts.blocks:
            x = block(x, training=training)
            hidden.append(x)
        x = _call(parts.norm, x, training)
        logits = _call(parts.head, x if table is None else [x, table], training)
    if "attentions" in wants and len(attentions) != len(parts.blocks):
        raise InputError(
            "Attention transfer expects blocks that show their attention. Received: "
            f"{type(model).__name__} {model.name!r}. Distil a float student first, or "
            "compare hidden states."
        )
    return Outputs(logits, tuple(hidden), tuple(attentions))


def _call(layer, x, training):
    # Only TF-MOT's wrappers of these layers ask whether they are trained.
    return layer(x, training=training) if hasattr(layer, "layer") else layer(x)


@contextlib.contextmanager
def _recording(block, found):
    """Append the probabilities of a block's attention while it is called."""
    layer = getattr(block, "layer", block)
    before = layer.probabilities_activation

    def record(probabilities):
        probabilities = before(probabilities)
        found.append(probabilities)
        return probabilities

    layer.probabilities_activation = record
    try:
        yield
    finally:
        layer.probabilities_activation = before
