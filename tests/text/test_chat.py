import concurrent.futures
import datetime
import json
from pathlib import Path

import pytest

from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.text import chat, template_process
from gpt_tf.text.chat import ChatTemplate
from gpt_tf.text.tokenizer import load_tokenizer

FOLDER = Path(__file__).parent / "chat"
CONVERSATIONS = json.loads((FOLDER / "conversations.json").read_text("utf-8"))
REFERENCE = json.loads((FOLDER / "reference.json").read_text("utf-8"))
SPECIAL = {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}
GREETING = [{"role": "user", "content": "Good morning."}]


def template_of(name):
    return ChatTemplate((FOLDER / name).read_text("utf-8"), SPECIAL)


# What transformers makes of the same


@pytest.mark.parametrize("name", sorted({case[0] for case in REFERENCE}))
def test_conversations_have_the_text_and_the_ids_of_transformers(name):
    template, tokenizer = template_of(name), load_tokenizer(FOLDER)
    cases = [case[1:] for case in REFERENCE if case[0] == name]
    assert len(cases) == len(CONVERSATIONS)
    for number, add_generation_prompt, text, expected in cases:
        messages = CONVERSATIONS[number]
        if text is None:
            with pytest.raises(InputError) as caught:
                template.render(messages, add_generation_prompt)
            assert expected in str(caught.value)
            continue
        rendered = template.render(messages, add_generation_prompt)
        assert rendered == text
        assert tokenizer.encode(rendered, special=True) == expected


def test_templates_know_what_transformers_tells_them():
    def rendered(source, **variables):
        return ChatTemplate(source, SPECIAL).render(GREETING, **variables)

    assert rendered("{{ strftime_now('%Y') }}") == str(datetime.date.today().year)
    assert rendered("{{ tools is none and documents is none }}") == "True"
    assert rendered("{{ enable_thinking }}", enable_thinking=False) == "False"
    source = (
        "{% for i in 'abc' %}{% if i == 'b' %}{% break %}{% endif %}{{ i }}{% endfor %}"
    )
    assert rendered(source) == "a"
    assert rendered("{{ messages|tojson }}") == json.dumps(GREETING)
    assert (
        rendered("{{ {'b': '<\u00e9>', 'a': 1}|tojson }}")
        == '{"b": "<\u00e9>", "a": 1}'
    )
    assert rendered("{{ bos_token }}{{ unk_token }}\n") == SPECIAL["bos_token"]
    assert rendered("{{ '\\ud800' }}") == "?"  # no UTF-8, and so no token, has it


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2.jinja", "<|im_end|>\n"),
        ("llama3.jinja", "<|eot_id|>"),
        ("alternating.jinja", "<|im_end|>\n"),
    ],
)
def test_the_end_of_a_turn_is_read_from_the_template(name, expected):
    assert template_of(name).turn_end == expected


def test_a_template_that_refuses_has_no_known_end_of_a_turn():
    assert ChatTemplate("{{ raise_exception('no') }}").turn_end == ""
    assert ChatTemplate("without what is said").turn_end == ""


# Messages that are none


@pytest.mark.parametrize(
    ("messages", "received"),
    [
        ([], r"\[\]"),
        ("Good morning.", "Good morning"),
        (GREETING[0], "role"),
        (["Good morning."], "Message 1 .*Good morning"),
        ([*GREETING, {"content": "Who says that?"}], "Message 2 .*Who says that"),
        ([{"role": "user"}], "Message 1 .*user"),
        ([{"role": 3, "content": ""}], "3 as its role"),
        ([{"role": "", "content": ""}], "'' as its role"),
        ([{"role": "user", "content": 3}], "3 as its content"),
        ([{"role": "user", "content": [{1, 2}]}], "not JSON serializable"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, received):
    with pytest.raises(InputError, match=received):
        template_of("smollm2.jinja").render(messages)


# Templates of strangers


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ messages[9].content }}",
        "{{ 'a' * 10**10 }}",
        "{{ 'a' * (3 * 10**7) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        f"{{% include '{__file__}' %}}",
        f"{{% from '{__file__}' import a %}}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}{{ (''|attr('__class__')).a }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ cycler.__init__.__globals__.os.system('id') }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__.json }}",
        "{{ strftime_now.__code__.co_consts }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}{{ '{0.a}'.format(1).a.b }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
    ],
)
def test_hostile_templates_end_in_one_line(source):
    with pytest.raises(InputError) as caught:
        ChatTemplate(source).render(GREETING)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert ChatTemplate("{{ messages[0].role }}").render(GREETING) == "user"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}",
        "{{ 10**(10**8) }}",  # one step of Python's, and computed while it is compiled
    ],
)
def test_a_template_that_takes_for_ever_is_ended(source, monkeypatch):
    monkeypatch.setattr(template_process, "SECONDS", 0.2)
    chat._renderer.stop()
    with pytest.raises(InputError, match=r"more than 0\.2 seconds"):
        ChatTemplate(source).render(GREETING)
    assert ChatTemplate("{{ messages[0].role }}").render(GREETING) == "user"
    chat._renderer.stop()


def test_threads_get_the_texts_that_they_asked_for():
    template = ChatTemplate("{{ messages[0].content }}")

    def echo(number):
        return template.render([{"role": "user", "content": str(number)}])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(echo, range(64))) == [str(i) for i in range(64)]


def test_without_jinja2_it_says_what_to_install(monkeypatch):
    chat._renderer.stop()
    monkeypatch.setattr(chat.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install jinja2"):
        template_of("smollm2.jinja").render(GREETING)


# Beside a tokenizer.json


@pytest.fixture
def folder(tmp_path):
    """Write the tokenizer and files beside it; return what is read of them."""

    def write(**files):
        content = (FOLDER / "tokenizer.json").read_bytes()
        (tmp_path / "tokenizer.json").write_bytes(content)
        for name, value in files.items():
            is_text = name == "chat_template"
            path = tmp_path / f"{name}.{'jinja' if is_text else 'json'}"
            path.write_text(value if is_text else json.dumps(value), "utf-8")
        return load_tokenizer(tmp_path)

    return write


def test_a_tokenizer_without_a_template_has_none_and_writes_none(folder, tmp_path):
    plain = folder()
    assert plain.chat_template is None
    assert folder(tokenizer_config={"eos_token": "<|eot_id|>"}).chat_template is None
    plain.save(tmp_path / "new")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["tokenizer.json"]


def test_hugging_face_s_files_are_read(folder):
    config = {
        "chat_template": "a",
        "bos_token": None,
        "eos_token": {"content": "<|eot_id|>", "special": True},
        "add_bos_token": True,
    }
    template = folder(tokenizer_config=config).chat_template
    assert template == ChatTemplate("a", {"eos_token": "<|eot_id|>"})
    assert template.end_tokens == ("<|eot_id|>",)
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    found = folder(tokenizer_config={"chat_template": named})
    assert found.chat_template.source == "d"
    found = folder(tokenizer_config=config, chat_template="newer")
    assert found.chat_template.source == "newer"


def test_all_ids_that_end_are_known(folder):
    ids = {"eos_token_id": [273, 274, 10**6, -1, "a", None]}
    found = folder(
        tokenizer_config={"chat_template": "a", **SPECIAL}, generation_config=ids
    )
    tokens = (*map(found.backend.id_to_token, (273, 274)), "<|im_end|>")
    assert found.chat_template.end_tokens == tokens
    end_of_text = found.end_of_text_id
    assert found.end_ids == (
        end_of_text,
        273,
        274,
        found.encode("<|im_end|>", special=True)[0],
    )


def test_a_saved_template_loads_the_same(folder, tmp_path):
    plain = folder()
    found = folder(
        tokenizer_config={"chat_template": "{{ bos_token }}\n\u00e9", **SPECIAL},
        generation_config={"eos_token_id": 273},
    )
    assert found.fingerprint() == plain.fingerprint()
    found.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.chat_template == found.chat_template
    assert again.end_ids == found.end_ids
    assert load_tokenizer(tmp_path / "again" / "tokenizer.json").chat_template


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"chat_template": 3}},
        {"tokenizer_config": [1]},
        {"tokenizer_config": {"chat_template": "a"}, "generation_config": "b"},
    ],
)
def test_damaged_files_beside_it_are_refused(folder, files):
    with pytest.raises(DamagedFileError):
        folder(**files)
