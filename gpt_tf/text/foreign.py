"""A tokenizer that somebody else trained, used as its file says."""

import re
from collections.abc import Sequence

import numpy as np

from gpt_tf.text.tokenizer import Tokenizer, bytes_of_stand_ins

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_WORD_BEGINS = "\u2581"  # SentencePiece's mark for a space


class ForeignTokenizer(Tokenizer):
    """Any tokenizer of the `tokenizers` library.

    Unlike a `BPETokenizer` it may change text: drop spaces, compose characters, put a
    space before the first word, or have no token for some bytes. So evaluation counts
    the bytes of the text itself, never of what is decoded.
    """

    kind = "foreign"

    def _read_vocabulary(self):
        content = self.to_json()
        is_byte_level = '"ByteLevel"' in content
        bytes_of = {}
        for token, index in self.backend.get_vocab().items():
            data = bytes_of_stand_ins(token) if is_byte_level else None
            if data is not None:
                bytes_of[index] = data
            elif found := _BYTE.fullmatch(token):
                bytes_of[index] = bytes([int(found[1], 16)])
            else:
                bytes_of[index] = token.replace(_WORD_BEGINS, " ").encode("utf-8")
        return bytes_of

    def ends_in(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return where each token of each text ends, in bytes of the text itself.

        A token that stands for nothing of the text ends where the one after it does, if
        it is at the beginning, and else where the one before it did.
        """
        found = []
        encoded = self.backend.encode_batch(list(texts), add_special_tokens=False)
        for text, encoding in zip(texts, encoded, strict=True):
            sizes = [len(c.encode("utf-8", errors="replace")) for c in text]
            bytes_before = np.cumsum([0, *sizes])
            ends = bytes_before[[end for _, end in encoding.offsets]]
            ends = np.maximum.accumulate(ends)
            ends[-1:] = bytes_before[-1]
            ends[ends == 0] = min(ends[ends > 0], default=0)
            found.append(ends)
        return found

    def encode_bytes(self, data: bytes) -> list[int]:
        return self.encode(data.decode("utf-8", errors="replace"))
