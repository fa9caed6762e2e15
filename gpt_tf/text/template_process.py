"""The process that renders chat templates: Jinja2's sandbox, in bounds.

`chat` starts this file as a program of its own; nothing imports it. A template that
never ends, or needs too much memory, then ends this process and no other. It asks for
nothing of gpt_tf, so that it is there in a tenth of a second.

Reference: `apply_chat_template` of Hugging Face's transformers, whose environment
this is.
"""

import contextlib
import functools
import json
import signal
import sys

SECONDS = 5  # of computing, for one conversation
MEMORY_BYTES = 1 << 29
MOST_CHARACTERS = 1 << 24


def _environment():
    from datetime import datetime

    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """`{% generation %}`, which marks what an assistant says."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, **options):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=options.get("sort_keys", False),
        )

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, ext.loopcontrols],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _render(compiled, source, values):
    try:
        text = compiled(source).render(values)
        if len(text) > MOST_CHARACTERS:
            return {"error": f"more than {MOST_CHARACTERS:,} characters"}
        return {"text": text}
    except Exception as error:  # whatever a stranger's template does
        kind = type(error).__name__
        message = str(error) if kind == "TemplateError" else f"{kind}: {error}"
        return {"error": " ".join(message.split())[:300]}


def main():
    """Answer each line of JSON, a template and its values, by a line.

    The first line has the limit in seconds, and where the process that started this one
    finds its modules.
    """
    seconds, sys.path[:] = json.loads(sys.stdin.readline())
    compiled = functools.lru_cache(4)(_environment().from_string)
    has_timer = hasattr(signal, "setitimer")  # not on Windows
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, hard))
    for line in sys.stdin:
        if has_timer:  # what it sends ends the process
            signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = json.dumps(_render(compiled, *json.loads(line)))
        if has_timer:
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
