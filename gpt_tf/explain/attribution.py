"""Which tokens of a prompt a model's next-token prediction depends on.

What is explained is the log-probability of one next token, the target. A token is
taken away by putting a neutral one in its place, so that all others keep their
positions. The methods:

- `lime`: hides random tokens and fits a linear model to what that did, near the whole
  prompt.
- `shap`: Shapley values by `shap.PermutationExplainer`; scores and base value add up to
  the model's answer. On `saved_models/python-small`, with 520 masked prompts of 32
  tokens, its ranks under two seeds correlate with 0.90, those of
  `shap.KernelExplainer` with 0.80, of `lime` with 0.64.
- `attention`: what the last position pays each token, mean over layers and heads. It
  is never negative and does not depend on the target. Attention rollout piles up on
  early tokens in a causal model: with the last token kept, a fifth of 24 tokens taken
  away by rollout cost 0.08 [0.02, 0.13] of probability more than random ones, by the
  mean 0.20 [0.15, 0.25].
- `gradient`: integrated gradients of the target's log-probability, from the neutral
  token's embedding to each token's own. They add up as Shapley values do.

The first two need scores alone and work for files too; the others look into a Keras
model.

Reference: Ribeiro et al., arXiv:1602.04938 (LIME); Lundberg and Lee, arXiv:1705.07874
(SHAP); Abnar and Zuidema, arXiv:2005.00928 (raw attention, and rollout); Sundararajan
et al., arXiv:1703.01365 (integrated gradients); Covert et al., arXiv:2011.14878, on
what it means to take a feature away.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np

from gpt_tf.edge.runtime import EdgeGPT
from gpt_tf.errors import InputError
from gpt_tf.evaluation.models import check_open
from gpt_tf.generation import sequence
from gpt_tf.generation.sampler import log_softmax
from gpt_tf.settings import arguments

METHODS = ("lime", "shap", "attention", "gradient")
# They look into the model; a file gives scores only.
KERAS_METHODS = ("attention", "gradient")
# Whose scores depend on the seed.
SAMPLING_METHODS = ("lime", "shap")

_MOST_SAMPLES = 1 << 20
_BATCH_SIZE = 64
_END_OF_TEXT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """What each token of a prompt did for a target.

    Base value and scores add up to the log-probability; for `gradient` nearly.
    """

    method: str  # one of `METHODS`
    ids: tuple[int, ...]  # the prompt's `T` token ids
    texts: tuple[str, ...]  # what they stand for; bytes that are no text as `\xe4`
    target_id: int  # the token whose probability is explained
    target_text: str
    probability: float  # the target's, after the whole prompt
    log_probability: float  # the same in nats
    # (T,) float64, in nats; of `attention` shares that add up to 1. Positive pushes the
    # target up.
    scores: np.ndarray
    # Of `shap` and `gradient` the log-probability with all tokens neutral.
    base_value: float | None
    neutral_id: int | None  # stands for one that is taken away; not for `attention`
    num_samples: int | None  # masked prompts, or steps of the integral
    seed: int

    def order(self) -> np.ndarray:
        """Return positions `(T,)`, from the highest score to the lowest."""
        return np.argsort(-self.scores, kind="stable")

    def as_dict(self) -> dict:
        """Return it as plain JSON values."""
        return dataclasses.asdict(self) | {"scores": self.scores.tolist()}


def explain_prompt(
    gpt,
    prompt,
    *,
    target=None,
    method: str = "lime",
    num_samples: int | None = None,
    seed: int = 0,
    neutral: int | str | None = None,
) -> Explanation:
    """Attribute a model's next-token prediction to the tokens of a prompt.

    Args:
        gpt: What `gpt_tf.evaluation.models.open_model` returns.
        prompt: A text or token ids. Of a prompt longer than the context the end is
            used, with a `GenerationNotice`.
        target: The next token to explain: its text, or its id. Default: the
            top-1 token.
        method: `"lime"`, `"shap"`, or of a Keras model `"attention"` or `"gradient"`.
        num_samples: Of `lime` and `shap`, how many masked prompts are scored, at
            least twice the number of tokens and 2 more; default: 8 a token, at least
            512. Of `gradient`, steps of the integral, at least 8; default: 64.
        seed: The same seed gives the same scores; at least 0 and below 2**32.
        neutral: The token that stands for one that is taken away, its text or id;
            default: a space. See `neutral_token`.

    Raises:
        InputError: The prompt, the target or an option cannot be used, or a file was
            to be looked into.

    Example:
        >>> with open_model("gpt.litertlm") as gpt:
        ...     explanation = explain_prompt(gpt, "import os\\nos.", method="shap")
        >>> explanation.texts[explanation.order()[0]]
    """
    check_method(gpt, method)
    seed = arguments.integer("seed", seed, most=2**32 - 1)
    ids = prompt_ids(gpt, prompt)
    num_samples = _samples(method, num_samples, len(ids))
    neutral = None if method == "attention" else neutral_token(gpt, neutral)
    scorer = MaskedPrompt(gpt, ids, neutral)
    logs = scorer.log_probabilities()
    target = int(np.argmax(logs)) if target is None else _token("target", target, gpt)
    scores, base = _METHODS[method](scorer, target, num_samples, seed)
    texts = token_texts(gpt, [*ids, target])
    return Explanation(
        method=method,
        ids=tuple(ids),
        texts=texts[:-1],
        target_id=target,
        target_text=texts[-1],
        probability=float(np.exp(logs[target])),
        log_probability=float(logs[target]),
        scores=np.asarray(scores, np.float64),
        base_value=None if base is None else float(base),
        neutral_id=neutral,
        num_samples=num_samples,
        seed=seed,
    )


class MaskedPrompt:
    """A prompt of which tokens can be taken away, for the token `neutral`.

    Args:
        gpt: The model.
        ids: The prompt's `T` token ids.
        neutral: The id; None if none will be taken away.
    """

    def __init__(self, gpt, ids: Sequence[int], neutral: int | None):
        self.gpt = gpt
        self.ids = np.asarray(ids, np.int64)
        self.neutral = neutral

    def log_probabilities(self) -> np.ndarray:
        """Return those of every next token after the whole prompt, `(V,)` float64."""
        (logits,) = self._logits(self.ids[np.newaxis])
        return log_softmax(logits)

    def values(self, kept: np.ndarray, target: int) -> np.ndarray:
        """Score the target after prompts of which only some tokens are kept.

        Args:
            kept: `(N, T)`, true where a token stays.
            target: A token id.

        Returns:
            Log-probabilities `(N,)` float64.
        """
        # Sorted, so that prompts one after the other begin alike.
        rows, places = np.unique(
            np.where(np.asarray(kept, bool), self.ids, self.neutral),
            axis=0,
            return_inverse=True,
        )
        values = [log_softmax(logits)[target] for logits in self._logits(rows)]
        return np.array(values)[places.reshape(-1)]

    def _logits(self, rows):
        """Yield the last position's logits `(V,)` of each row."""
        if hasattr(self.gpt, "model"):
            yield from _logits_of_keras(self.gpt.model, rows)
        elif isinstance(self.gpt, EdgeGPT):
            yield from _logits_of_file(self.gpt, rows)
        else:
            for row in rows:
                self.gpt.reset()
                yield self.gpt.logits(row.tolist())[-1]
            self.gpt.reset()


def check_method(gpt, method: str) -> None:
    """Refuse a method that is unknown, or that a file does not allow."""
    check_open(gpt)
    arguments.one_of("method", method, METHODS)
    if method in KERAS_METHODS and not hasattr(gpt, "model"):
        raise InputError(
            f"The method {method} looks into a Keras model; of a file there are scores "
            f"only. Received: {type(gpt).__name__}. Name the Keras model that the "
            'file was made of, or choose "lime" or "shap".'
        )


def prompt_ids(gpt, prompt) -> list[int]:
    """Return a prompt's ids: of one longer than the context, those of its end."""
    rows, _, is_list = sequence.rows_of(prompt, gpt.tokenizer)
    if is_list:
        raise InputError(
            f"Explaining expects one prompt. Received: a list of {len(rows)}. Explain "
            "them one by one."
        )
    sequence.check_rows(rows, gpt.config["vocab_size"])
    (ids,) = rows
    if len(ids) > gpt.context_length:
        warnings.warn(
            f"The prompt of {len(ids)} tokens is longer than the context of "
            f"{gpt.context_length}; its beginning was cut off.",
            sequence.GenerationNotice,
            stacklevel=3,
        )
    return ids[-gpt.context_length :]


def token_texts(gpt, ids: Sequence[int]) -> tuple[str, ...]:
    """Return what tokens stand for; what is no text by itself as `\\xe4`."""
    tokenizer = gpt.tokenizer
    if tokenizer is None:
        return tuple(f"<{token}>" for token in ids)
    return tuple(
        tokenizer.decode_bytes([token]).decode("utf-8", "backslashreplace")
        if token != tokenizer.end_of_text_id
        else _END_OF_TEXT
        for token in ids
    )


def neutral_token(gpt, neutral=None) -> int:
    """Return the id of the token that stands for one that is taken away.

    Taking a token out of the text instead would shift all that follow, and positions
    are learned. The default is a space, which every byte-level vocabulary has: of a
    fifth of 32 tokens it moved the prediction of `saved_models/python-small` by 0.39
    nats of divergence, random tokens 0.45, "..." (shap's default) 0.42, a line break
    0.95, the end of text 1.22.

    Args:
        gpt: The model.
        neutral: A text of one token, an id, or None for the default.

    Raises:
        InputError: It is no token, or there is no default.
    """
    if neutral is not None:
        return _token("neutral", neutral, gpt)
    with contextlib.suppress(InputError):
        return _token("neutral", " ", gpt)
    raise InputError(
        "Taking tokens away expects a space in the vocabulary, to put in their place; "
        "there is none. Name another token in `neutral`."
    )


# The methods: each returns scores (T,) and the base value, or None.


def _lime(scorer, target, num_samples, seed):
    with _library():
        from lime.lime_text import LimeTextExplainer

        # A text whose words are the tokens' numbers: so the library's own sampler,
        # kernel and fit work on our tokens.
        hidden = "_"
        explainer = LimeTextExplainer(
            bow=False,
            split_expression=" ",
            mask_string=hidden,
            feature_selection="none",
            random_state=seed,
        )

        def values(texts):
            kept = [[word != hidden for word in text.split(" ")] for text in texts]
            return scorer.values(kept, target)[:, np.newaxis]

        count = len(scorer.ids)
        explained = explainer.explain_instance(
            " ".join(map(str, range(count))),
            values,
            labels=(0,),
            num_features=count,
            num_samples=num_samples,
        )
    scores = np.zeros(count)
    for position, score in explained.local_exp[0]:
        scores[position] = score
    return scores, None


def _shap(scorer, target, num_samples, seed):
    with _library():
        import shap

        count = len(scorer.ids)
        # A masker of our own: that of tables is compiled anew in every process.
        explainer = shap.PermutationExplainer(
            lambda kept: scorer.values(kept, target),
            lambda mask, row: (np.asarray(mask, bool)[np.newaxis],),
            seed=seed,
        )
        explained = explainer(np.ones((1, count)), max_evals=num_samples, silent=True)
    return explained.values[0], explained.base_values[0]


def _attention(scorer, target, num_samples, seed):
    from gpt_tf.distillation.distiller import outputs_of

    ids = scorer.ids.astype(np.int32)[np.newaxis]
    layers = outputs_of(scorer.gpt.model, ids, ("attentions",)).attentions
    last = [layer.numpy()[0, :, -1] for layer in layers]  # (H, T) of each layer
    mean = np.mean(last, axis=(0, 1), dtype=float)
    return mean / mean.sum(), None


def _gradient(scorer, target, num_samples, seed):
    import tensorflow as tf

    from gpt_tf.models.cached_forward import parts_of

    parts = parts_of(scorer.gpt.model)
    ids = scorer.ids.astype(np.int32)[np.newaxis]
    end, table = parts.embed(ids)  # (1, T, C)
    start, _ = parts.embed(np.full_like(ids, scorer.neutral))
    total = np.zeros(ids.shape[1])
    # The middles of as many equal parts of the way.
    shares = (np.arange(num_samples, dtype=np.float32) + 0.5) / num_samples
    for chunk in np.array_split(shares, -(-num_samples // _BATCH_SIZE)):
        x = start + tf.cast(chunk[:, np.newaxis, np.newaxis], end.dtype) * (end - start)
        with tf.GradientTape() as tape:
            tape.watch(x)
            logits = _last_logits(parts, x, table)
            value = tf.reduce_sum(tf.nn.log_softmax(logits)[:, target])
        slopes = tf.reduce_sum(tape.gradient(value, x), axis=0)  # (T, C)
        total += tf.reduce_sum(slopes * (end - start)[0], axis=-1).numpy()
    base = scorer.values(np.zeros((1, len(scorer.ids)), bool), target)[0]
    return total / num_samples, base


_METHODS = {
    "lime": _lime,
    "shap": _shap,
    "attention": _attention,
    "gradient": _gradient,
}


# Scoring prompts that differ in some tokens


def _logits_of_keras(model, rows):
    from gpt_tf.models.cached_forward import parts_of

    parts = parts_of(model)
    for start in range(0, len(rows), _BATCH_SIZE):
        x, table = parts.embed(rows[start : start + _BATCH_SIZE].astype(np.int32))
        yield from _last_logits(parts, x, table).numpy()


def _last_logits(parts, x, table):
    """Return logits `(B, V)` of what follows vectors `(B, T, C)`."""
    for block in parts.blocks:
        x = block(x, training=False)
    return parts.score(x[:, -1:], table)[:, 0]


def _logits_of_file(gpt, rows):
    """What a row has in common with the one before it stays in the cache."""
    before = np.full(rows.shape[1], -1)
    with contextlib.closing(gpt.new_session()) as session:
        for row in rows:
            with gpt.one_thread:
                # The last token is run in any case: its logits are asked for.
                session.position = int(np.argmax([*(row != before)[:-1], True]))
                session.prefill(row[session.position : -1].tolist())
                logits = session.decode(int(row[-1]))
            yield logits
            before = row


def _samples(method, num_samples, num_tokens):
    """Return how many samples a method takes, or refuse what was asked for."""
    if method == "attention":
        if num_samples is None:
            return None
        raise InputError(
            "The method attention takes no samples: it is computed once. Received: "
            f"num_samples={arguments.shown(num_samples)}. Leave it out."
        )
    if method == "gradient":
        default, fewest, what = 64, 8, "steps of the integral"
    else:
        default, fewest = max(512, 8 * num_tokens), 2 * num_tokens + 2
        what = f"masked prompts for {num_tokens} tokens"
    if num_samples is None:
        return default
    repair = f"They are {what}; leave it out for {default}."
    return arguments.integer(
        "num_samples", num_samples, fewest, _MOST_SAMPLES, repair=repair
    )


def _token(name, token, gpt):
    """Return the id of a token given as text or id."""
    if not isinstance(token, str | bytes):
        most = gpt.config["vocab_size"] - 1
        repair = "It is the text or the id of a token of the vocabulary."
        return arguments.integer(name, token, 0, most, repair=repair)
    tokenizer = gpt.tokenizer
    if tokenizer is None:
        raise InputError(
            f"`{name}` of text expects a tokenizer; the model has none. Pass an id."
        )
    if token == _END_OF_TEXT and tokenizer.end_of_text_id is not None:
        return tokenizer.end_of_text_id
    (ids,), _, _ = sequence.rows_of(token, tokenizer)
    if len(ids) == 1:
        return _token(name, ids[0], gpt)
    repair = "Name a token, a space for example."
    if ids:
        begins = token_texts(gpt, ids[:1])[0]
        repair = f"It begins with {begins!r}, id {ids[0]}: name that, or another."
    raise InputError(
        f"`{name}` expects one token. Received: {arguments.shown(token)}, of "
        f"{len(ids)} tokens. {repair}"
    )


@contextlib.contextmanager
def _library():
    """Silence a library's remarks about others; put NumPy's random state back."""
    before = np.random.get_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        np.random.set_state(before)
