"""The routes of the server.

A request passes `Guard` (key, size, time), then FastAPI and the classes of `protocol`,
which refuse what is no request; its prompts are encoded in a thread, and `ModelWorker`
generates. Whatever goes wrong is answered in the form of OpenAI's errors.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import prometheus_client
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse, StreamingResponse

from gpt_tf.edge.serving.guard import Guard
from gpt_tf.edge.serving.metrics import Metrics
from gpt_tf.edge.serving.protocol import (
    Answer,
    ChatRequest,
    CompletionRequest,
    TextRequest,
    error_of,
    event,
)
from gpt_tf.edge.serving.worker import FullError, Job, ModelWorker
from gpt_tf.errors import InputError
from gpt_tf.generation import conversation, sequence
from gpt_tf.settings import arguments
from gpt_tf.settings.server import ServerConfig

# Where a request does not say how many; the first is OpenAI's, the second EdgeGPT's.
_COMPLETION_TOKENS, _CHAT_TOKENS = 16, 512
_RETRY = {"Retry-After": "1"}
_EVENTS_AT_ONCE = 32  # of one answer: a few milliseconds at most
_MESSAGES = {
    404: "There is nothing at this address. The server has /v1/models, "
    "/v1/completions, /v1/chat/completions, /health and /metrics.",
    405: "The address expects another method.",
}


def make_app(workers: Sequence[ModelWorker], config: ServerConfig, metrics: Metrics):
    """Make the server's application.

    Args:
        workers: One a model; the application starts and closes them.
        config: The settings.
        metrics: What the workers count.

    Returns:
        The application, for uvicorn.
    """
    by_name = {worker.name: worker for worker in workers}

    @contextlib.asynccontextmanager
    async def lifespan(app):
        for worker in workers:
            worker.start()
        yield
        for worker in workers:
            await run_in_threadpool(worker.close)

    app = FastAPI(title="gpt_tf", lifespan=lifespan, openapi_url=None)
    app.add_middleware(Guard, config=config)
    app.add_exception_handler(StarletteHTTPException, _on_refusal)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(InputError, _on_input_error)
    app.add_exception_handler(Exception, _on_defect)

    def worker_of(name):
        if name not in by_name:
            raise _refused(
                404,
                f"`model` expects one of {', '.join(by_name)}. "
                f"Received: {name[:80]!r}.",
                code="model_not_found",
                param="model",
            )
        return by_name[name]

    @app.get("/health")
    async def health():
        alive = all(worker.is_alive for worker in workers)
        return JSONResponse(
            {"status": "ok" if alive else "failed"}, 200 if alive else 503
        )

    @app.get("/metrics")
    async def metrics_page():
        return Response(
            prometheus_client.generate_latest(metrics.registry),
            media_type=prometheus_client.CONTENT_TYPE_LATEST,
        )

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [_described(worker) for worker in workers]}

    @app.get("/v1/models/{name}")
    async def model(name: str):
        return _described(worker_of(name))

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request):
        worker = worker_of(body.model)
        rows, limits = await run_in_threadpool(_read_prompts, body, worker, config)
        return await _answer(body, request, worker, rows, limits)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request):
        worker = worker_of(body.model)
        rows, limits = await run_in_threadpool(_read_messages, body, worker, config)
        return await _answer(body, request, worker, rows, limits)

    return app


def _described(worker):
    return {
        "id": worker.name,
        "object": "model",
        "created": worker.created,
        "owned_by": "gpt_tf",
    }


# Prompts


def _read_prompts(body: CompletionRequest, worker, config):
    """Return the prompts' ids, and the options that limit a text."""
    gpt = worker.gpt
    rows, *_ = sequence.rows_of(body.prompt, gpt.tokenizer)
    _check_rows(rows, body, worker, config)
    count = _new_tokens(body.max_tokens, _COMPLETION_TOKENS, config, "max_tokens")
    return rows, {"max_new_tokens": count, "stop": body.stops}


def _read_messages(body: ChatRequest, worker, config):
    """As `_read_prompts`, of a conversation."""
    gpt, name = worker.gpt, "max_completion_tokens"
    count = body.max_completion_tokens
    if count is None:
        count, name = body.max_tokens, "max_tokens"
    prompt, limits = conversation.begin(
        [message.plain() for message in body.messages],
        gpt.tokenizer,
        context_length=gpt.context_length,
        max_new_tokens=_new_tokens(count, _CHAT_TOKENS, config, name),
        stop=body.stops,
    )
    rows = [gpt.tokenizer.encode(prompt, special=True)]
    _check_rows(rows, body, worker, config)
    return rows, limits


def _new_tokens(asked, default, config, name):
    if asked is None:
        return min(default, config.max_new_tokens)
    if asked > config.max_new_tokens:
        raise _refused(
            400,
            f"`{name}` expects at most {config.max_new_tokens}. Received: {asked}.",
            param=name,
        )
    return asked


def _check_rows(rows, body, worker, config):
    gpt = worker.gpt
    if len(rows) * body.n > config.max_choices:
        raise _refused(
            400,
            f"A request expects at most {config.max_choices} texts, prompts times `n`. "
            f"Received: {len(rows)} times {body.n}.",
            param="n",
        )
    sequence.check_rows(rows, gpt.config["vocab_size"])
    most = min(config.max_prompt_tokens or gpt.context_length, gpt.context_length)
    longest = max(map(len, rows))
    if longest > most:
        raise _refused(
            400,
            f"A prompt expects at most {most} tokens. Received: {longest}. Shorten it.",
            code="context_length_exceeded",
            param="messages" if isinstance(body, ChatRequest) else "prompt",
        )


# Answers


async def _answer(body: TextRequest, request, worker, rows, limits):
    options = {
        **limits,
        "temperature": body.temperature,
        "top_k": body.top_k,
        "top_p": body.top_p,
        "repetition_penalty": body.repetition_penalty,
        "seed": body.seed,
        "as_text": True,
        "num_logprobs": body.num_logprobs,
    }
    answer = Answer(body, worker.gpt.tokenizer, sum(map(len, rows)))
    rows = [row for row in rows for _ in range(body.n)]
    if not worker.is_alive:
        raise _refused(503, f"{worker.name} has stopped. Start the server again.")
    try:
        job = worker.submit(rows, options, body.stream)
    except FullError:
        raise _refused(
            429, f"The queue of {worker.name} is full. Ask again later.", headers=_RETRY
        ) from None
    if body.stream:
        return _EventStream(_events(job, answer, len(rows)), job)
    return await _wait(job, answer, request)


async def _events(job: Job, answer: Answer, count: int) -> AsyncIterator[str]:
    for line in answer.begin(count):
        yield line
    try:
        async for pieces in job:
            for begin in range(0, len(pieces), _EVENTS_AT_ONCE):
                few = pieces[begin : begin + _EVENTS_AT_ONCE]
                yield "".join(map(answer.event, few))
                await asyncio.sleep(0)  # the other connections have their turn
    except InputError as error:
        yield event(error_of(str(error), 500))
    else:
        yield "".join(answer.end())


class _EventStream(StreamingResponse):
    """Server-sent events of a job, which ends with the response, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], job: Job):
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self._job = job

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def _wait(job, answer, request):
    """Return the answer when the job is done, unless the client goes away."""
    work = asyncio.ensure_future(_collect(job))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=499)  # nobody reads it
        try:
            return JSONResponse(answer.whole(work.result()))
        except InputError as error:
            raise _refused(500, str(error)) from None
    finally:
        job.cancel()
        work.cancel()
        gone.cancel()


async def _collect(job):
    return [piece async for pieces in job for piece in pieces]


async def _disconnected(request):
    while (await request.receive())["type"] != "http.disconnect":
        pass


# Errors


def _refused(status, message, code=None, param=None, headers=None):
    return HTTPException(status, (message, code, param), headers)


async def _on_refusal(request, error):
    message, code, param = (
        error.detail if isinstance(error.detail, tuple) else (error.detail, None, None)
    )
    message = _MESSAGES.get(error.status_code, message) if code is None else message
    status = error.status_code
    return JSONResponse(error_of(message, status, code, param), status, error.headers)


async def _on_invalid(request, error):
    found = error.errors()
    _, *place = found[0]["loc"]
    if found[0]["type"] == "json_invalid":
        return _invalid(f"The body expects JSON. Received: {found[0]['ctx']['error']}.")
    if not place:
        return _invalid(f"{found[0]['msg'].removeprefix('Value error, ')}.")
    own = [one for one in found if one["loc"][1] == place[0]]
    said = dict.fromkeys(one["msg"] for one in own)
    expected = ", or ".join(one.removeprefix("Input should be ") for one in said)
    received = arguments.shown(own[0]["input"])
    return _invalid(
        f"`{place[0]}` expects: {expected}. Received: {received}.", place[0]
    )


def _invalid(message, param=None):
    return JSONResponse(error_of(message, 400, None, param), 400)


async def _on_input_error(request, error):
    return _invalid(str(error))


async def _on_defect(request, error):
    return JSONResponse(error_of("The server failed.", 500), 500)
