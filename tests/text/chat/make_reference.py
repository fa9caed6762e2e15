"""Write reference.json: what Hugging Face's transformers makes of the conversations.

Run with transformers (5.24 it was) and this package. The templates are written in the
manner of SmolLM2's, Qwen 2's, Qwen 3's, Llama 3.2's, SmolLM3's (`generation`) and
Llama 2's (`alternating`); the tokenizer is a small one with their special tokens.
"""

import itertools
import json
from pathlib import Path

import tokenizers
import transformers

from gpt_tf.text.tokenizer import BPETokenizer

HERE = Path(__file__).parent
SPECIAL = {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}
OTHERS = "<|im_start|> <|start_header_id|> <|end_header_id|> <|eot_id|>".split()


def main():
    """Write the tokenizer, and the reference by it."""
    backend = BPETokenizer.train(["the quick brown fox 123 user assistant " * 9], 270)
    backend.backend.add_special_tokens([*SPECIAL.values(), *OTHERS])
    (HERE / "tokenizer.json").write_text(backend.to_json() + "\n", "utf-8")
    peer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(backend.to_json()), **SPECIAL
    )
    conversations = json.loads((HERE / "conversations.json").read_text("utf-8"))
    lines = []
    templates = sorted(HERE.glob("*.jinja"))
    for number, (template, messages) in enumerate(
        itertools.product(templates, conversations)
    ):
        prompt = number % 2 == 0
        options = {"add_generation_prompt": prompt}
        options["chat_template"] = template.read_text("utf-8")
        try:
            text = peer.apply_chat_template(messages, tokenize=False, **options)
            found = peer.apply_chat_template(
                messages, tokenize=True, return_dict=False, **options
            )
        except Exception as error:
            text, found = None, str(error)
        case = [template.name, conversations.index(messages), prompt, text, found]
        lines.append(json.dumps(case, ensure_ascii=False))
    text = "[\n" + ",\n".join(lines) + "\n]\n"
    (HERE / "reference.json").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
