"""The page's terms, for those who meet them for the first time."""

from gpt_tf.reporting.page import elements

_TERMS = (
    (
        "inter-token",
        "Inter-token latency",
        "The time from one token of the answer to the next, in milliseconds. It is "
        "what makes text seem to flow: a person reads about 5 to 10 tokens a second, "
        "one in 100 to 200 ms.",
    ),
    (
        "first-token",
        "Time to first token",
        "From the request until the first token of the answer is there: the whole "
        "prompt has to be read first, so it grows with the prompt.",
    ),
    (
        "response-time",
        "Response time",
        "From the request until the last token of the answer: the first token's time "
        "and that of all the others.",
    ),
    (
        "percentile",
        "Median, p95, p99, worst",
        "Of a hundred measurements put in order, the 50th, the 95th, the 99th and the "
        "last. The median is the usual case; p95 is exceeded by one in twenty, and is "
        "what a latency budget is about, since people notice the slow ones.",
    ),
    (
        "middle-half",
        "Middle half",
        "Between the 25th and the 75th of a hundred measurements put in order: how far "
        "usual ones differ from each other.",
    ),
    (
        "tokens-per-second",
        "Tokens per second",
        "How many tokens one request gets in a second while it is written. Throughput "
        "is the same of all concurrent requests together.",
    ),
    (
        "load-time",
        "Load time",
        "Opening the file in a process that runs already, until it can be asked.",
    ),
    (
        "cold-start",
        "Cold start",
        "From starting a new process to its first token, with everything that has to "
        "be loaded.",
    ),
    (
        "peak-memory",
        "Peak memory",
        "The most memory that a process running the file had at any moment, with "
        "Python and the libraries in it.",
    ),
    (
        "bandwidth",
        "Share of the bandwidth",
        "For each token all weights are read from memory. 50 % means: half as fast as "
        "if nothing but reading took time, at the rate at which NumPy reads. That is a "
        "yardstick and no limit: other code reads up to twice as fast, and weights "
        "that stay in the processor's cache faster still.",
    ),
    (
        "energy",
        "Energy per token",
        "Joules that the processor and its memory used per token, where the machine "
        "counts them; left out where it does not.",
    ),
    (
        "perplexity",
        "Perplexity",
        "How surprised a model is by text that it has not seen: 5 means as unsure "
        "as between 5 equally likely tokens. Lower is better. It depends on the "
        "tokenizer; only models with the same one can be compared by it.",
    ),
    (
        "bits-per-byte",
        "Bits per byte",
        "The same surprise, per byte of text instead of per token, so that models with "
        "different tokenizers can be compared. Lower is better.",
    ),
    (
        "token-accuracy",
        "Token accuracy",
        "The share of places at which the model's likeliest token is the one that "
        "follows.",
    ),
    (
        "kl",
        "KL divergence",
        "How far a model's probabilities for the next token are from the reference's, "
        "in nats; 0 means the same. It shows what compression changed even where "
        "perplexity stayed.",
    ),
    (
        "top1",
        "Same likeliest token",
        "The share of places at which a file and the reference expect the same token "
        "most: what a reader of greedy text would notice.",
    ),
    (
        "parsed",
        "Completions that parse",
        "Of code that a model continued, the share that Python's parser accepts. The "
        "true text cut in the same places does not always parse either.",
    ),
    (
        "interval",
        "95 % interval",
        "Other text of the same kind would have given another number. In 95 of 100 "
        "cases an interval made like this contains the true one. Two files whose "
        "intervals overlap widely may be equally good.",
    ),
    (
        "quantisation",
        "float32, int8, int4",
        "How many bits a weight takes: 32, 8 or 4. Fewer make a file smaller and "
        "usually faster, and its answers less exact.",
    ),
    (
        "distillation",
        "Teacher and student",
        "A student is a smaller model that learns from a larger one, its teacher, what "
        "that expects at every place.",
    ),
)


def glossary():
    terms = [
        elements.tag(
            "div",
            elements.tag("dt", title, id=f"term-{anchor}"),
            elements.tag("dd", text),
        )
        for anchor, title, text in _TERMS
    ]
    return elements.tag(
        "section",
        elements.tag("h2", "Terms"),
        elements.tag(
            "details",
            elements.tag("summary", "What the words mean"),
            elements.tag("dl", terms, class_="terms"),
        ),
        id="terms",
    )
