"""Two hundred clients for a minute, of whom some go away at any moment."""

import asyncio
import random
import subprocess
import sys
import time
import urllib.request

import openai
import psutil
import pytest

CLIENTS = 200
SECONDS = 60
PROMPTS = [letter * length for letter in "abcdefgh" for length in (1, 5, 12)]
OPTIONS = {"max_tokens": 12, "temperature": 0.9}


async def client_of(number, client, expected, end, counts):
    """Ask until the time is up; leave every third answer in the middle."""
    draw = random.Random(number)
    while time.monotonic() < end:
        prompt, seed = draw.choice(PROMPTS), draw.randrange(3)
        leaves, text, reason = draw.random() < 1 / 3, "", None
        try:
            stream = await client.completions.create(
                model="gpt", prompt=prompt, seed=seed, stream=True, **OPTIONS
            )
            async with stream:
                pieces = draw.randrange(8)
                async for piece in stream:
                    text += piece.choices[0].text
                    reason = piece.choices[0].finish_reason
                    pieces -= 1
                    if leaves and pieces < 0:
                        break
        except openai.RateLimitError as error:
            counts["refused"] += 1
            await asyncio.sleep(float(error.response.headers["Retry-After"]))
            continue
        if leaves:
            counts["left"] += 1
            assert expected[prompt, seed].startswith(text)
        else:
            counts["answered"] += 1
            ended = "length" if len(text) == OPTIONS["max_tokens"] else "stop"
            assert (text, reason) == (expected[prompt, seed], ended)


async def load(base_url, expected, end, counts):
    async with openai.AsyncOpenAI(
        base_url=base_url, api_key="none", max_retries=0, timeout=120
    ) as client:
        await asyncio.gather(
            *(client_of(n, client, expected, end, counts) for n in range(CLIENTS))
        )


@pytest.mark.slow
def test_none_of_two_hundred_clients_is_lost_and_memory_stays_flat(gpt, exported):
    expected = {
        (prompt, seed): gpt.generate(
            prompt, max_new_tokens=12, temperature=0.9, seed=seed
        )
        for prompt in PROMPTS
        for seed in range(3)
    }
    code = "from gpt_tf import cli; cli.main()"
    options = f"serve --port 0 --max-waiting 150 --model {exported.litertlm}"
    with subprocess.Popen(
        [sys.executable, "-c", code, *options.split()],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    ) as process:
        try:
            check(process, expected)
        finally:
            process.terminate()


def check(process, expected):
    """Let the clients work; see that all is as it should be."""
    base_url = process.stdout.readline().split()[0]
    memory = psutil.Process(process.pid).memory_info
    counts = dict.fromkeys(("answered", "left", "refused"), 0)
    sizes = []
    for part in (1 / 4, 3 / 4):
        end = time.monotonic() + part * SECONDS
        asyncio.run(load(base_url, expected, end, counts))
        sizes.append(memory().rss)
    assert counts["answered"] > CLIENTS and counts["left"] > CLIENTS / 3, counts
    assert sizes[1] < sizes[0] + 20e6, sizes
    time.sleep(2)  # for the last ones that left
    with openai.OpenAI(base_url=base_url, api_key="none") as client:
        client.completions.create(model="gpt", prompt="abc", max_tokens=1)
    address = base_url.removesuffix("/v1")
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        page = answer.read().decode()
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if line[0] != "#")

    def value(name, *labels):
        labels = ",".join(['model="gpt"', *labels])
        return float(values.get(f"gpt_tf_{name}{{{labels}}}", 0))

    assert value("texts_active") == value("texts_waiting") == 0
    assert value("texts_total", 'outcome="error"') == 0
    assert value("refused_total") == counts["refused"]
    ended = sum(value("texts_total", f'outcome="{o}"') for o in ("length", "stop"))
    gone = value("texts_total", 'outcome="cancelled"')
    # Who leaves may find the whole answer on its way.
    assert ended + gone == counts["answered"] + counts["left"] + 1
    assert ended >= counts["answered"] + 1
