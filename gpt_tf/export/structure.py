"""The graph of a `.tflite`, compared with the one that its facts call for.

LiteRT believes what a file says of itself, and a wrong index in it can end the
process. A hash is no help against who can compute it. But the whole graph follows
from a few facts, so it is built here once more, without weights, and the file has to
be the same in every operation, option, shape, type, index and size. What is free are
the weights and how integers stand for real numbers, within limits. Old files stay
readable for as long as the graph of their facts is the same.
"""

import math

import numpy as np

from gpt_tf.errors import InputError
from gpt_tf.export import constants, graph, signatures, tflite_writer
from gpt_tf.export.reader import BOOL, F32, I8, I32, U8, U32, BrokenError, Flatbuffer
from gpt_tf.export.tflite_writer import Op, Type, schema
from gpt_tf.models.sizes import FORM, checked_form
from gpt_tf.quantization.modes import SMALLEST_SCALE

_MOST_ELEMENTS = 1 << 28  # of a tensor: 1 GB in float32
_LONGEST = 1 << 29  # three times as much is an int32 still
_ALIGNMENT = 16
# Operations whose output is scaled anew, and the factor up to which LiteRT can.
_SCALED = (Op.ADD, Op.BATCH_MATMUL, Op.FULLY_CONNECTED)
_LARGEST_RATIO = 255
# Blocks of all subgraphs together, and what each takes at the least.
_MOST_BLOCKS, _BLOCK_BYTES = 1 << 14, 256

# The fields of `schema.fbs` that gpt_tf writes, by index.
_tables, _text, _follow = Flatbuffer.tables, Flatbuffer.text, Flatbuffer.follow
_integers = Flatbuffer.integers
_MODEL = {0: U32, 1: _tables, 2: _tables, 3: _text, 4: _tables, 6: _tables, 7: _tables}
_CODE = {0: I8, 2: I32, 3: I32}
_SUBGRAPH = {0: _tables, 1: _integers, 2: _integers, 3: _tables, 4: _text}
_TENSOR = {0: _integers, 1: I8, 2: U32, 3: _text, 4: _follow, 8: BOOL}
_QUANTIZATION = {2: Flatbuffer.floats, 3: Flatbuffer.longs, 4: U8, 5: _follow, 6: I32}
_BLOCKWISE = {0: I32, 1: I32, 2: I32}
_OPERATION = {0: U32, 1: _integers, 2: _integers, 3: U8, 4: _follow}
_BUFFER = {0: Flatbuffer.span}
_METADATA = {0: _text, 1: U32}
_SIGNATURE = {0: _tables, 1: _tables, 2: _text, 4: U32}
_NAMED = {0: _text, 1: U32}
_OPTIONS = {
    schema.AddOptionsT: {0: I8, 1: BOOL},
    schema.BatchMatMulOptionsT: {0: BOOL, 1: BOOL, 2: BOOL},
    schema.CastOptionsT: {0: I8, 1: I8},
    schema.ConcatenationOptionsT: {0: I32, 1: I8},
    schema.DequantizeOptionsT: {},
    schema.FullyConnectedOptionsT: {0: I8, 1: I8, 2: BOOL, 3: BOOL, 4: I8},
    schema.GatherOptionsT: {0: I32, 1: I32},
    schema.GeluOptionsT: {0: BOOL},
    schema.MulOptionsT: {0: I8},
    schema.QuantizeOptionsT: {},
    schema.ReducerOptionsT: {0: BOOL},
    schema.ReshapeOptionsT: {0: _integers},
    schema.SliceOptionsT: {},
    schema.SoftmaxOptionsT: {0: F32},
    schema.SplitOptionsT: {0: I32},
    schema.SubOptionsT: {0: I8, 1: BOOL},
    schema.TransposeOptionsT: {},
}
_SIZES = (
    "context_length",
    "embedding_dim",
    "feedforward_dim",
    "head_dim",
    "num_heads",
    "num_layers",
    "vocab_size",
)


def check(data, facts: dict) -> None:
    """See that a `.tflite` holds the graph that its facts call for, and no other.

    Args:
        data: The file's bytes, sliceable.
        facts: What its seal says.

    Raises:
        BrokenError: A fact cannot be, or the graph is another one.
    """
    _check_facts(facts, len(data))
    _Comparison(data, facts).compare()


def _check_facts(facts, size):
    """See that every fact that steers the graph or the runtime is possible."""

    def whole(value, most):
        return type(value) is int and 1 <= value <= most

    def ascending(name, most):
        found = facts.get(name)
        return (
            isinstance(found, list)
            and all(whole(length, most) for length in found)
            and found == sorted(set(found))
        )

    def known():
        config, mode = facts.get("config"), facts.get("mode")
        yield "mode", mode in signatures.MODES
        yield "config", isinstance(config, dict)
        most = min(size, _LONGEST)  # each is the length of something in the file
        for name in _SIZES:
            yield f"config: {name}", whole(config.get(name), most)
        width, inner = config["embedding_dim"], config["num_heads"] * config["head_dim"]
        yield "config: head_dim", inner <= most
        is_stored = config.get("positions", "learned") == "learned"
        names = [name for name in _SIZES if is_stored or name != "context_length"]
        lengths = inner, *(config[name] for name in names)
        yield "config: embedding_dim", width * max(lengths) <= 2 * size
        remainder = (width | inner | config["feedforward_dim"]) % constants.INT4_BLOCK
        yield "config: feedforward_dim", mode != "int4" or not remainder
        yield "config: tie_embeddings", type(config.get("tie_embeddings")) is bool
        yield "config: form", _is_form(config)
        epsilon = config.get("layer_norm_epsilon")
        is_number = type(epsilon) in (int, float)
        yield "config: layer_norm_epsilon", is_number and 0 < epsilon < 1e30
        yield "capacity", whole(facts.get("capacity"), config["context_length"])
        integers = constants.MODES[mode].full
        kind = "int8" if integers else "float32"
        yield "cache_dtype", facts.get("cache_dtype") == kind
        yield "per_channel", type(facts.get("per_channel")) is bool
        yield "prefill_lengths", ascending("prefill_lengths", facts["capacity"])
        yield "score_lengths", ascending("score_lengths", facts["capacity"])
        count = 1 + len(facts["prefill_lengths"]) + len(facts["score_lengths"])
        if "batch_sizes" in facts:
            most = signatures.BATCH_SIZES[-1]
            yield "batch_sizes", ascending("batch_sizes", most)
            count += sum(facts["batch_sizes"])
        outliers = facts.get("head_outliers", 0)
        splits = constants.MODES[mode].quantises_rows
        good = type(outliers) is int and 0 <= outliers < width
        yield "head_outliers", good and (splits or not outliers)
        offsets = facts.get("has_offsets", False)
        yield "has_offsets", offsets is False or (offsets is True and mode == "int4")
        by_row = facts.get("attends_by_row", False)
        may = graph.may_attend_by_row(config, constants.MODES[mode])
        yield "attends_by_row", by_row is False or (by_row is True and may)
        blocks = count * config["num_layers"]
        yield "config: num_layers", blocks <= min(_MOST_BLOCKS, size // _BLOCK_BYTES)
        fingerprint = facts.get("tokenizer_fingerprint", 0)
        yield "tokenizer_fingerprint", isinstance(fingerprint, str | None)

    for name, good in known():
        if not good:
            raise BrokenError(f"a seal that does not state a possible {name}")


def _is_form(config):
    """Whether what a configuration says of a form can be."""
    try:
        sizes = {"feedforward_dim": None, **config}
        found = checked_form(config, sizes)
    except InputError:
        return False
    stated = {name: config[name] for name in FORM if name in config}
    return all(found[name] == value for name, value in stated.items())


class _Outline(tflite_writer.Model):
    """A model whose buffers are arrays; that equal ones are one, only a file shows."""

    def _buffer_with(self, array):
        self.buffers.append(array)
        return len(self.buffers) - 1


def _same(what, expected, received):
    if expected != received:
        raise BrokenError(f"{what} {received!r:.80} in place of {expected!r:.80}")


class _Comparison:
    """One file beside the graph that is expected of it."""

    def __init__(self, data, facts):
        self.data, self.facts = data, facts
        self.file = Flatbuffer(data, strict=True)
        self.quant_params = {}  # where the file has the expected parameters
        self.largest = {}  # their largest scale
        self.known = set()  # tensors that were found equal

    def compare(self):
        root = self._filled(self.file.follow(0), _MODEL)
        _same("version", 3, root[0])
        self.codes = [self._code(position) for position in root[1]]
        self.buffers = [self.file.table(one, _BUFFER).get(0) for one in root[4]]
        _same("the first buffer", [None], self.buffers[:1])
        _same("metadata", 1, len(root[6]))
        metadata = self.file.table(root[6][0], _METADATA)
        _same("metadata", signatures.METADATA_NAME.encode(), metadata.get(0))
        begin, _ = self._content(metadata.get(1, 0))
        prefix = signatures.SEAL_PREFIX
        _same("metadata", prefix, self.data[begin : begin + len(prefix)])
        expected = self._expected(root[2])
        _same("operators", list(expected.codes), self.codes)
        _same("the number of subgraphs", len(expected.subgraphs), len(root[2]))
        _same("the number of signatures", len(expected.subgraphs), len(root[7]))
        self.expected_buffers = expected.buffers
        for index, subgraph in enumerate(expected.subgraphs):
            self._compare_subgraph(subgraph, root[2][index])
            self._compare_signature(subgraph, index, root[7][index])

    def _filled(self, position, kinds):
        """Return a table's values; what is left out is an empty list."""
        return {index: [] for index in kinds} | self.file.table(position, kinds)

    def _code(self, position):
        found = self.file.table(position, _CODE)
        operator = found.get(3, 0)
        _same("an operator", min(operator, 127), found.get(0, 0))
        return operator, found.get(2, 1)

    def _expected(self, subgraphs):
        facts = self.facts
        masked = self._ends_with_a_mask(subgraphs)
        parts = constants.outline(
            facts["mode"],
            facts["config"],
            facts["per_channel"],
            masked,
            bool(facts.get("head_outliers")),
            facts.get("has_offsets", False),
        )
        model = _Outline()
        graph.build_all(model, parts, facts)
        return model

    def _ends_with_a_mask(self, subgraphs):
        """Whether ids are ruled out, which depends on the tokenizer: an addition."""
        operations = subgraphs and self._filled(subgraphs[0], _SUBGRAPH)[3]
        if not operations:
            raise BrokenError("no operations")
        code = self.file.table(operations[-1], _OPERATION).get(0, 0)
        return code < len(self.codes) and self.codes[code][0] == Op.ADD

    def _compare_subgraph(self, expected, position):
        found = self._filled(position, _SUBGRAPH)
        _same("a subgraph", expected.signature.encode(), found[4])
        self.expected, self.tensors = expected.tensors, found[0]
        self.place_of, self.expected_at = {}, {}
        _same("the number of operations", len(expected.operations), len(found[3]))
        self._match(expected.inputs.values(), found[1])
        for (code, inputs, outputs, options), position in zip(
            expected.operations, found[3], strict=True
        ):
            operation = self.file.table(position, _OPERATION)
            _same("an operator", code, operation.get(0, 0))
            self._match(inputs, operation.get(1, ()))
            self._match(outputs, operation.get(2, ()))
            self._check_scales(self.codes[code][0], inputs, outputs[0])
            self._compare_options(options, operation)
        self._match(expected.outputs.values(), found[2])
        _same("the number of tensors", len(self.expected_at), len(self.tensors))

    def _check_scales(self, operator, inputs, output):
        """See that sums and products of integers fit what they are scaled to."""
        if output.quant is None or operator not in _SCALED:
            return
        factors = [self.largest[id(tensor.quant)] for tensor in inputs[:2]]
        largest = max(factors) if operator == Op.ADD else math.prod(factors)
        if largest > _LARGEST_RATIO * self.largest[id(output.quant)]:
            received = self.largest[id(output.quant)]
            raise BrokenError(f"the scales {factors} of inputs to one of {received}")

    def _compare_options(self, expected, operation):
        if expected is None:
            _same("options", (0, None), (operation.get(3, 0), operation.get(4)))
            return
        kind = type(expected)
        name = kind.__name__[:-1]
        _same("options", getattr(schema.BuiltinOptions, name), operation.get(3, 0))
        if 4 not in operation:
            raise BrokenError(f"no {name}")
        found = self.file.table(operation[4], _OPTIONS[kind])
        blank = vars(kind())
        for index, (field, value) in enumerate(vars(expected).items()):
            if isinstance(value, list):
                value = tuple(value)
            _same(f"{name}.{field}", value, found.get(index, blank[field]))

    def _compare_signature(self, expected, index, position):
        found = self._filled(position, _SIGNATURE)
        _same("a signature", expected.signature.encode(), found[2])
        _same("a signature's subgraph", index, found[4] or 0)
        for tensors, named in (
            (expected.inputs, found[0]),
            (expected.outputs, found[1]),
        ):
            entries = [self.file.table(one, _NAMED) for one in named]
            _same(
                "a signature's tensors",
                [(n.encode(), self.place_of[t.index]) for n, t in tensors.items()],
                [(entry.get(0), entry.get(1, 0)) for entry in entries],
            )

    def _match(self, tensors, places):
        _same("the number of operands", len(tensors), len(places))
        for tensor, place in zip(tensors, places, strict=True):
            if tensor is None:
                _same("an operand", -1, place)
            else:
                self._match_tensor(tensor.index, place)

    def _match_tensor(self, index, place):
        """See that a tensor stands where the same one stood before, or first does."""
        if index in self.place_of:
            _same("an operand", self.place_of[index], place)
            return
        if not 0 <= place < len(self.tensors):
            raise BrokenError(f"tensor {place} of {len(self.tensors)}")
        # Constants of the same values are one in the file.
        if self.expected_at.setdefault(place, index) != index:
            _same("a constant's buffer", True, self.expected[index][1] > 0)
        self.place_of[index] = place
        self._compare_tensor(self.expected[index], self.tensors[place])

    def _compare_tensor(self, expected, position):
        tensor, buffer, name, scales = expected
        key = position, tensor.shape, tensor.type, buffer, name, id(tensor.quant)
        if scales is None and key in self.known:
            return
        self.known.add(key)
        found = self.file.table(position, _TENSOR)
        _same("a shape", tensor.shape, found.get(0))
        _same("a type", tensor.type, found.get(1, 0))
        _same("a tensor's name", (name or "").encode(), found.get(3))
        _same("has_rank", True, found.get(8))
        if math.prod(tensor.shape) > _MOST_ELEMENTS:
            raise BrokenError(f"a tensor of the shape {tensor.shape}")
        if buffer:
            self._compare_buffer(tensor, self.expected_buffers[buffer], found.get(2, 0))
        else:
            _same("a buffer", 0, found.get(2, 0))
        _same("quantisation", tensor.quant is not None, 4 in found)
        if tensor.quant is not None:
            self._compare_quantisation(tensor, buffer > 0, scales, found[4])

    def _content(self, place):
        """Return where the bytes of a buffer lie."""
        if not 0 <= place < len(self.buffers) or self.buffers[place] is None:
            raise BrokenError(f"buffer {place} of {len(self.buffers)}")
        return self.buffers[place]

    def _compare_buffer(self, tensor, array, place):
        begin, end = self._content(place)
        _same("a buffer's size", array.nbytes, end - begin)
        _same("a buffer's alignment", 0, begin % _ALIGNMENT)
        if tensor.type == Type.INT32 and tensor.quant is None:
            # Indices and shapes; all else is only computed with.
            _same("a constant", array.tobytes(), self.data[begin:end])

    def _compare_quantisation(self, tensor, is_constant, scales, position):
        expected = tensor.quant
        found = self.file.table(position, _QUANTIZATION)
        _same("an axis", expected.axis, found.get(6, 0))
        if expected.block_size is not None:
            kind = schema.QuantizationDetails.BlockwiseQuantization
            _same("quantisation", ({4, 5}, kind), (found.keys() - {6}, found.get(4)))
            blocks = self.file.table(found[5], _BLOCKWISE)
            _same("a block", expected.block_size, blocks.get(2, 0))
            _same("zero points", -1, blocks.get(1, 0))
            self._match_tensor(scales, blocks.get(0, 0))
            self._check_block_scales(self.tensors[blocks.get(0, 0)])
            return
        _same("quantisation", {2, 3}, found.keys() - {6})
        factors, zero_points = found[2], found[3]
        first_position = self.quant_params.setdefault(id(expected), position)
        first = self.file.table(first_position, _QUANTIZATION)
        # Operations rely on it where both sides have the same parameters.
        if first is not found:
            _same("scales", first[2].tobytes(), factors.tobytes())
            _same("zero points", first[3].tobytes(), zero_points.tobytes())
        count = len(expected.scales)
        _same("the number of scales", (count, count), (len(factors), len(zero_points)))
        if not (np.isfinite(factors).all() and (factors >= SMALLEST_SCALE).all()):
            raise BrokenError("a scale that is not a normal number above 0")
        limit = 0 if is_constant or tensor.type != Type.INT8 else 128
        if zero_points.min() < -limit or zero_points.max() > max(limit - 1, 0):
            raise BrokenError(f"a zero point {zero_points.min()}, {zero_points.max()}")
        self.largest[id(expected)] = float(factors.max())

    def _check_block_scales(self, position):
        place = self.file.table(position, _TENSOR)[2]
        if place not in self.known:
            begin, end = self.buffers[place]
            factors = np.frombuffer(self.data[begin:end], "<f2")
            if not ((factors > 0) & (factors < np.inf)).all():
                raise BrokenError("a scale of a block that is not a number above 0")
            self.known.add(place)
