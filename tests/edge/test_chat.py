"""Talking with an exported file: `EdgeGPT.chat` and `gpt-tf chat`."""

from pathlib import Path

import pytest

from gpt_tf.edge import EdgeGPT, loader
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.export import signatures
from gpt_tf.export.litertlm import export_litertlm
from gpt_tf.export.reader import BrokenError, packed_integers, protobuf
from gpt_tf.generation.sequence import GenerationNotice
from gpt_tf.text.chat import ChatTemplate
from gpt_tf.text.tokenizer import load_tokenizer
from tests.edge.conftest import small_model

FOLDER = Path(__file__).parents[1] / "text" / "chat"
GREETING = [{"role": "user", "content": "the fox"}]
GREEDY = {"temperature": 0, "max_new_tokens": 12}
END = "<|im_end|>"


def tokenizer_with(name, **changes):
    tokenizer = load_tokenizer(FOLDER)
    special = {"bos_token": "<|begin_of_text|>", "eos_token": END} | changes
    source = (FOLDER / name).read_text("utf-8")
    tokenizer.chat_template = ChatTemplate(source, special)
    return tokenizer


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """A model with SmolLM2's template, its tokenizer and its file."""
    tokenizer = tokenizer_with("smollm2.jinja")
    model = small_model(vocab_size=tokenizer.vocab_size, context_length=256)
    path = tmp_path_factory.mktemp("talking") / "gpt.litertlm"
    export_litertlm(model, tokenizer, path, "float32", prefill_lengths=(1, 8))
    return model, tokenizer, path


@pytest.fixture(scope="module")
def gpt(talking):
    with EdgeGPT(talking[2]) as opened:
        yield opened


# The file


def test_the_template_and_all_ids_that_end_are_in_the_file(gpt, talking):
    _, tokenizer, _ = talking
    own, found = tokenizer.chat_template, gpt.tokenizer.chat_template
    assert gpt.tokenizer.end_ids == tokenizer.end_ids
    assert set(found.end_tokens) >= {END}
    assert found.source.endswith(own.source.rstrip("\n"))
    for messages in (GREETING, [{"role": "system", "content": "x"}, *GREETING]):
        for add_generation_prompt in (True, False):
            expected = own.render(messages, add_generation_prompt)
            assert found.render(messages, add_generation_prompt) == expected


def test_a_file_without_a_template_has_none(exported):
    with EdgeGPT(exported.litertlm) as plain:
        assert plain.tokenizer.chat_template is None
        with pytest.raises(InputError, match="chat template"):
            plain.chat(GREETING)


def test_a_template_that_fails_is_left_out_of_the_file(talking, tmp_path, notices):
    tokenizer = tokenizer_with("smollm2.jinja")
    tokenizer.chat_template = ChatTemplate("{{ ''.__class__.__mro__ }}")
    path = tmp_path / "gpt.litertlm"
    export_litertlm(talking[0], tokenizer, path, "float32", prefill_lengths=(1,))
    assert sum("the chat template is left out" in notice for notice in notices) == 1
    with EdgeGPT(path) as plain:
        assert plain.tokenizer.chat_template is None


def test_metadata_that_are_none_are_refused(gpt):
    for data in (b"\x3a\xff\x01", b"\x3a\x02\xff\xff", b"\x0b", b"\x12\x02\x0a\x05"):
        with pytest.raises(DamagedFileError, match=r"gpt\.litertlm"):
            loader._template_of(data, gpt.tokenizer, "gpt.litertlm")
    bare = signatures.BARE_TEMPLATE.encode()
    size = bytes([len(bare) % 128 + 128, len(bare) // 128])
    for data in (b"", b"\x3a\x00", b"\x3a" + size + bare):
        assert loader._template_of(data, gpt.tokenizer, "gpt.litertlm") is None


def test_protobuf_is_read_as_google_s_library_writes_it():
    pytest.importorskip("litert_lm_builder")
    from litert_lm_builder.runtime.proto import llm_metadata_pb2

    message = llm_metadata_pb2.LlmMetadata(max_num_tokens=300)
    message.jinja_prompt_template = "\u00e9" * 99
    for ids in ([5], [1, 128, 2**31 - 1]):
        message.stop_tokens.add().token_ids.ids.extend(ids)
    message.sampler_params.p = 0.5  # of fixed width, within
    data = message.SerializeToString()
    found = protobuf(data)
    assert found[5] == [300]
    assert found[7] == [("\u00e9" * 99).encode()]
    packed = [protobuf(protobuf(one)[1][0])[1][0] for one in found[2]]
    assert [packed_integers(one) for one in packed] == [[5], [1, 128, 2**31 - 1]]
    for end in range(1, len(data)):
        try:
            protobuf(data[:end])
        except BrokenError:
            continue  # else it ends between two fields


# Answers


def test_an_answer_is_that_of_keras(gpt, talking):
    model, tokenizer, _ = talking
    messages = [{"role": "system", "content": "fox"}, *GREETING]
    expected = model.chat(messages, tokenizer=tokenizer, **GREEDY)
    assert expected
    assert gpt.chat(messages, **GREEDY) == expected
    assert "".join(gpt.chat(messages, stream=True, **GREEDY)) == expected
    prompt = tokenizer.chat_template.render(messages)
    assert gpt.generate(prompt, **GREEDY) == expected


@pytest.mark.parametrize("where", ["turn", "eos"])
def test_the_end_of_a_turn_ends_the_answer(talking, where):
    """A token that it draws is declared to be that end."""
    model, tokenizer, _ = talking
    prompt = tokenizer.encode(tokenizer.chat_template.render(GREETING), special=True)
    drawn = model.generate(prompt, tokenizer=tokenizer, **GREEDY)
    tokens = [tokenizer.backend.id_to_token(token) for token in drawn]
    place, expected = next(
        (i, text)
        for i, token in enumerate(tokens)
        if token.isascii() and token not in (text := tokenizer.decode(drawn[:i])) and i
    )
    other = tokenizer_with("smollm2.jinja")
    other.backend.add_special_tokens([tokens[place]])
    source = tokenizer.chat_template.source
    if where == "turn":  # no answer stands in this prompt
        end = f"('{END}' if message.role != 'assistant' else '{tokens[place]}')"
        other.chat_template = ChatTemplate(source.replace(f"'{END}' + '", f"{end} + '"))
    else:
        other.chat_template = ChatTemplate(source, {"eos_token": tokens[place]})
    assert model.chat(GREETING, tokenizer=other, **GREEDY) == expected


def test_what_is_in_the_cache_is_not_computed_again(gpt, talking, monkeypatch):
    model, tokenizer, _ = talking
    gpt.reset()
    answer = gpt.chat(GREETING, **GREEDY)
    messages = [*GREETING, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": "and"})
    ids = tokenizer.encode(tokenizer.chat_template.render(messages), special=True)
    read, prefill = [], gpt._session.prefill
    monkeypatch.setattr(
        gpt._session, "prefill", lambda new: (read.append(len(new)), prefill(new))
    )
    found = gpt.chat(messages, **GREEDY)
    begun = len(
        tokenizer.encode(tokenizer.chat_template.render(GREETING), special=True)
    )
    assert 0 < read[0] < len(ids) - begun
    assert found == model.chat(messages, tokenizer=tokenizer, **GREEDY)
    # `generate` computes all of it, so that a seed gives the same text again.
    assert gpt.generate(tokenizer.chat_template.render(messages), **GREEDY) == found
    assert read[1] == len(ids) - 1


def test_a_long_conversation_goes_on_without_its_oldest_turns(gpt):
    messages = []
    with pytest.warns(GenerationNotice, match="oldest turns"):
        for _ in range(10):
            messages += GREETING
            answer = gpt.chat(messages, **GREEDY)
            messages.append({"role": "assistant", "content": answer})
    with pytest.raises(InputError, match="The last turn expects room"):
        gpt.chat([{"role": "user", "content": "fox " * 400}])


# The command


def test_the_command_talks_and_begins_anew(command, gpt, talking):
    _, _, path = talking
    gpt.reset()
    first = gpt.chat(GREETING, **GREEDY)
    messages = [*GREETING, {"role": "assistant", "content": first}]
    second = gpt.chat([*messages, {"role": "user", "content": "and"}], **GREEDY)
    assert second != first
    options = ("--temperature", 0, "--max-new-tokens", 12)
    lines = "the fox\n\nand\n/reset\nthe fox\n/exit\nnever read\n"
    result = command("chat", "--model", path, *options, stdin=lines)
    assert (result.status, result.out) == (0, f"{first}\n{second}\n{first}\n")
    assert result.err.count("tokens/s") == 3
    told = command(
        *("chat", "--model", path, "--system", "fox", *options), stdin="the fox"
    )
    messages = [{"role": "system", "content": "fox"}, *GREETING]
    assert told.out == gpt.chat(messages, **GREEDY) + "\n"


def test_an_interruption_ends_the_answer_and_not_the_command(
    command, talking, monkeypatch
):
    asked = []

    def chat(self, messages, **options):
        asked.append([message["content"] for message in messages])
        yield "par"
        if len(asked) == 1:
            raise KeyboardInterrupt
        yield "tial"

    monkeypatch.setattr(EdgeGPT, "chat", chat)
    result = command("chat", "--model", talking[2], stdin="a\nb\n")
    assert (result.status, result.out) == (0, "par\npartial\n")
    assert asked == [["a"], ["a", "par", "b"]]


def test_a_model_without_a_template_takes_one(command, exported, tmp_path):
    result = command("chat", "--model", exported.litertlm, stdin="hello\n")
    assert (result.status, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert "gpt-tf generate" in result.err and "--template" in result.err
    template = tmp_path / "plain.jinja"
    options = ("chat", "--model", exported.litertlm, "--template", template)
    result = command(*options, stdin="hello\n")
    assert result.status == 2 and str(template) in result.err
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}", "utf-8")
    options += ("--temperature", 0, "--max-new-tokens", 8)
    result = command(*options, stdin="hello\n")
    with EdgeGPT(exported.litertlm) as plain:
        expected = plain.generate("hello", temperature=0, max_new_tokens=8)
    assert (result.status, result.out) == (0, f"{expected}\n")
    template.write_text("{{ ''.__class__.__mro__ }}", "utf-8")
    result = command(*options, stdin="hello\n")
    assert (result.status, result.out) == (2, "")
    assert "SecurityError" in result.err and result.err.count("\n") == 1


# LiteRT-LM


@pytest.fixture(scope="module")
def engine(talking):
    litert_lm = pytest.importorskip(
        "litert_lm", reason="litert-lm-api, Google's runtime, is missing"
    )
    litert_lm.set_min_log_severity(litert_lm.LogSeverity.SILENT)
    backend = litert_lm.Backend.CPU(thread_count=1)
    with litert_lm.Engine(
        str(talking[2]), backend=backend, cache_dir=":nocache"
    ) as engine:
        yield engine


def test_litert_lm_makes_the_same_prompt_of_the_file(engine, talking):
    _, tokenizer, _ = talking
    assert engine.eos_token_ids == [[token] for token in tokenizer.end_ids]
    with engine.create_conversation() as conversation:
        text = conversation.render_message_to_string("the fox")
    assert text == tokenizer.chat_template.render(GREETING)
    with engine.create_conversation(system_message="fox") as conversation:
        text = conversation.render_message_to_string("the fox")
    messages = [{"role": "system", "content": "fox"}, *GREETING]
    assert text == tokenizer.chat_template.render(messages)


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.jinja")))
def test_litert_lm_takes_templates_as_they_are_written_into_a_file(engine, name):
    from gpt_tf.export.litertlm import _template_of

    tokenizer = tokenizer_with(name)
    source, _ = _template_of(tokenizer)
    with engine.create_conversation(chat_template=source) as conversation:
        text = conversation.render_message_to_string("the fox")
    assert text == tokenizer.chat_template.render(GREETING)
