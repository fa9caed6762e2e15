"""EleutherAI's lm-eval on a file for a device, by lm-eval's own command line.

    $ python -m gpt_tf.evaluation.lm_eval --model gpt_tf \\
          --model_args path=gpt.litertlm --tasks hellaswag

lm-eval looks for models among its own; this module adds `gpt_tf` to them and hands
over. It runs the file by `EdgeGPT` and imports neither TensorFlow nor PyTorch.
"""

import itertools
import logging
import sys

from gpt_tf.edge.runtime import EdgeGPT
from gpt_tf.errors import InputError
from gpt_tf.evaluation import tasks
from gpt_tf.settings import arguments

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    line = f"lm-eval is expected: {error}. Install it: pip install 'gpt-tf[lm-eval]'"
    if __name__ == "__main__":
        sys.exit(f"gpt-tf: {line}")
    raise ModuleNotFoundError(line, name=error.name) from None

logger = logging.getLogger(__name__)

# Of requests that do not say, as in lm-eval's own models.
_MAX_NEW_TOKENS = 256
# What lm-eval hands to every model, and a file does not have.
_NOT_OURS = {"batch_size", "max_batch_size", "device"}


@register_model("gpt_tf")
class ShippedGPT(LM):
    """A `.tflite` or `.litertlm` as lm-eval knows models.

    Log-likelihoods and answers are those of `gpt_tf.evaluation.tasks`. Of a context
    that is too long the end is used, as by lm-eval's own models.

    Args:
        path: The file.
        num_threads: As for `EdgeGPT`.
        **others: `batch_size`, `max_batch_size` and `device`, which change nothing.

    Raises:
        InputError: The file cannot be used, or an argument is unknown.

    Example:
        >>> lm = ShippedGPT("gpt.litertlm")
        >>> lm_eval.simple_evaluate(lm, tasks=["arc_easy"])
    """

    def __init__(self, path, num_threads=None, **others):
        super().__init__()
        for name in others.keys() - _NOT_OURS:
            arguments.one_of("model_args", name, ("path", "num_threads"))
        self.gpt = EdgeGPT(str(path), num_threads=num_threads)
        self.tokenizer = self.gpt.tokenizer
        if self.tokenizer is None:
            raise InputError(
                f"lm-eval expects a tokenizer with {path}. Received: none. Put "
                "tokenizer.json beside it, or name a .litertlm."
            )

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        """Return of each (context, continuation) its log-likelihood in nats, and
        whether it is what greedy decoding gives."""
        found = []
        pairs = [request.args for request in requests]
        for context, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
            texts = [text for _, text in group]
            sizes = [len(self.tokenizer.encode(text, special=True)) for text in texts]
            most = max(self.gpt.context_length + 1 - max(sizes), 0)
            kept = self._end_of(context, most, most)
            found += tasks.log_likelihoods(self.gpt, kept, texts)
        for pair, result in zip(pairs, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
        """Return the log-likelihood of whole texts in nats, as `EdgeGPT.score` does."""
        found = []
        for (text,) in (request.args for request in requests):
            first = self.tokenizer.end_of_text_id
            before = [first] if first is not None else self.tokenizer.encode("\n")
            ids = [*before[:1], *self.tokenizer.encode(text)]
            found.append(float(self.gpt.score(ids).sum()))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests, disable_tqdm: bool = False):
        """Return the answers to (context, options), each up to a text of `until`."""
        found = []
        for context, options in (request.args for request in requests):
            until = options.get("until") or []
            count = options.get("max_gen_toks", _MAX_NEW_TOKENS)
            sampling = {}
            if options.get("do_sample"):
                names = {"temperature", "top_k", "top_p"} & options.keys()
                sampling = {name: options[name] for name in names}
            most = self.gpt.context_length
            kept = self._end_of(context, most, most - min(count, most // 2))
            stop = [until] if isinstance(until, str) else until
            found.append(tasks.answer(self.gpt, kept, count, stop, **sampling))
            self.cache_hook.add_partial("generate_until", (context, options), found[-1])
        return found

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """Return messages as the text of a prompt, by the tokenizer's template."""
        return tasks.rendered(self.tokenizer, chat_history, add_generation_prompt)

    def chat_template(self, chat_template=False):
        """Return the template's source, for lm-eval's report."""
        template = getattr(self.tokenizer, "chat_template", None)
        return template.source if chat_template and template else ""

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's caches."""
        return self.tokenizer.fingerprint()

    def _end_of(self, context, most, kept):
        """Return a context of at most so many tokens, or the end of it that is kept."""
        ids = self.tokenizer.encode(context, special=True)
        if len(ids) <= most:
            return context
        logger.warning("a context of %d tokens was cut to %d", len(ids), kept)
        # Cut within a character, it may have more tokens again.
        for first in range(len(ids) - kept, len(ids)):
            text = self.tokenizer.decode(ids[first:])
            if len(self.tokenizer.encode(text, special=True)) <= kept:
                return text
        return ""


def main():
    """Run lm-eval's command line, which knows `--model gpt_tf` now."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except InputError as error:
        print(f"gpt-tf: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
