"""What the server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_GAPS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """Counters of all models, each under its `model` label.

    Attributes:
        registry: Holds them, for `prometheus_client.generate_latest`.
        first_token: Seconds from a text's arrival to its first token.
        between_tokens: Seconds between two of its tokens.
        tokens: Tokens by `kind`, `prompt` or `generated`; their rate is the throughput.
        texts: Texts that ended, by `outcome`: `stop`, `length`, `cancelled` or `error`.
        refused: Texts that found the queue full.
        active: Texts that are being generated.
        waiting: Texts in the queue.
    """

    def __init__(self):
        self.registry = CollectorRegistry()

        def make(kind, name, text, labels=("model",), **options):
            options["registry"] = self.registry
            return kind(f"gpt_tf_{name}", text, labels, **options)

        self.first_token = make(
            Histogram,
            "time_to_first_token_seconds",
            "From a text's arrival to its first token.",
            buckets=_SECONDS,
        )
        self.between_tokens = make(
            Histogram,
            "time_between_tokens_seconds",
            "Between two tokens of a text.",
            buckets=_GAPS,
        )
        self.tokens = make(
            Counter, "tokens", "Tokens of prompts and texts.", ("model", "kind")
        )
        self.texts = make(
            Counter, "texts", "Texts that ended, and how.", ("model", "outcome")
        )
        self.refused = make(Counter, "refused", "Texts that found the queue full.")
        self.active = make(Gauge, "texts_active", "Texts that are being generated.")
        self.waiting = make(Gauge, "texts_waiting", "Texts in the queue.")
