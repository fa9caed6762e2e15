"""Other runtimes at the task of decode.py: GPT-2 small, random weights, greedy.

Every peer is a function `make(task, threads, folder)`. It builds its model in the
folder unless it is there, loads it, and returns `repeat(count)`, which returns a dict
per repetition: `first_token_seconds`, from the prompt's arrival to the first new token
known, and `decode_seconds`, what a further token takes, argmax included.

ONNX Runtime, llama.cpp and PyTorch get the same weights, so that their logits can be
compared.
"""

import functools
import time
from pathlib import Path

import numpy as np
from harness import (
    Contender,
    NotHere,
    gpt_tf_model,
    import_or_not_here,
    import_torch,
    keras_hub_gpt2,
)

EPSILON = 1e-5


def random_weights(task):
    """Make a GPT-2's weights, kernels as (inputs, outputs), blocks numbered."""
    generator = np.random.default_rng(0)
    width = task.embedding_dim

    def normal(*shape):
        return generator.standard_normal(shape, np.float32) * np.float32(0.02)

    weights = {
        "tokens": normal(task.vocab_size, width),
        "positions": normal(task.context_length, width),
        "norm": 1 + normal(width),
        "norm_bias": normal(width),
    }
    shapes = {"qkv": (1, 3), "out": (1, 1), "up": (1, 4), "down": (4, 1)}
    for layer in range(task.num_layers):
        for name in ("norm_1", "norm_2"):
            weights[f"{name}_{layer}"] = 1 + normal(width)
            weights[f"{name}_bias_{layer}"] = normal(width)
        for name, (inputs, outputs) in shapes.items():
            weights[f"{name}_{layer}"] = normal(inputs * width, outputs * width)
            weights[f"{name}_bias_{layer}"] = normal(outputs * width)
    return weights


def _repeat(task, step):
    """Measure `step(tokens, position)`, which returns the last token's logits.

    At position 0 it forgets what was in its cache.
    """
    prompt = [int(token) for token in task.prompt()]

    def once():
        began = time.perf_counter()
        token = int(np.argmax(step(prompt, 0)))
        first = time.perf_counter() - began
        seconds = []
        for position in range(len(prompt), len(prompt) + task.new_tokens - 1):
            began = time.perf_counter()
            token = int(np.argmax(step([token], position)))
            seconds.append(time.perf_counter() - began)
        return _times(first, seconds)

    return lambda count: [once() for _ in range(count)]


def _times(first, seconds):
    return {
        "first_token_seconds": float(first),
        "decode_seconds": float(np.median(seconds)),
    }


def _kept(folder, name, task, write):
    """Return the path of this shape's file, which `write(path)` makes once."""
    shape = f"{task.num_layers}x{task.embedding_dim}x{task.num_heads}"
    shape += f"-{task.vocab_size}-{task.context_length}"
    path = Path(folder) / f"{shape}-{name}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name("unfinished-" + path.name)
        write(unfinished)
        unfinished.rename(path)
    return path


# ONNX Runtime


def onnx_runtime_int8(task, threads, folder):
    """Dynamic int8, per tensor: scales per channel were no faster."""
    import_or_not_here("onnx")
    import_or_not_here("onnxruntime")
    path = _kept(folder, "int8.onnx", task, functools.partial(_write_int8, task))
    return _repeat(task, _onnx_step(path, task, threads))


def onnx_runtime_int4(task, threads, folder):
    """4-bit weights in blocks of 128, the quantiser's default, int8 activations."""
    import_or_not_here("onnx")
    import_or_not_here("onnxruntime")
    import_or_not_here("onnx_ir")  # the quantiser wants it
    path = _kept(folder, "int4.onnx", task, functools.partial(_write_int4, task))
    return _repeat(task, _onnx_step(path, task, threads))


def _write_int8(task, path):
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        _onnx_gpt2(task, "Attention"),
        path,
        op_types_to_quantize=["MatMul", "Attention"],
        per_channel=False,
        weight_type=QuantType.QInt8,
        # Shape inference does not know the contrib operators' outputs.
        extra_options={"DefaultTensorType": TensorProto.FLOAT},
    )


def _write_int4(task, path):
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer

    config = matmul_nbits_quantizer.DefaultWeightOnlyQuantConfig(
        block_size=128,
        is_symmetric=True,
        accuracy_level=4,  # int8 activations
        bits=4,
    )
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
        _onnx_gpt2(task, "MultiHeadAttention"), algo_config=config
    )
    quantizer.process()
    onnx.save(quantizer.model.model, path)


class _Graph:
    """Nodes and constants of an ONNX graph, in the order in which they are added."""

    def __init__(self, weights):
        from onnx import numpy_helper

        self.nodes = []
        self.constants = [
            numpy_helper.from_array(value, name) for name, value in weights.items()
        ]

    def add(self, kind, inputs, outputs=None, fused=True, **attributes):
        """Add a node and return the name of its first output."""
        from onnx import helper

        name = f"{kind}_{len(self.nodes)}"
        domain = "com.microsoft" if fused else ""
        node = helper.make_node(
            kind, inputs, outputs or [name], name, domain=domain, **attributes
        )
        self.nodes.append(node)
        return node.output[0]

    def dense(self, x, name, layer):
        product = self.add("MatMul", [x, f"{name}_{layer}"], fused=False)
        return self.add("Add", [product, f"{name}_bias_{layer}"], fused=False)

    def last(self, x):
        return self.add("Gather", [x, "last"], fused=False, axis=1)

    def add_and_norm(self, x, y, scale, bias):
        """Return the sum and its normalisation."""
        name = f"sum_{len(self.nodes)}"
        normed = self.add(
            "SkipLayerNormalization",
            [x, y, scale, bias],
            [f"{name}_normed", "", "", name],
            epsilon=EPSILON,
        )
        return name, normed


def _onnx_gpt2(task, attention):
    """Build the graph that onnxruntime.transformers makes of GPT-2.

    It has two additions: the last token alone goes through the last feed-forward part
    and the head, and the queries, keys and values come from the attention operator
    or, for `MultiHeadAttention`, from a MatMul of their own.
    """
    from onnx import TensorProto, helper

    weights = random_weights(task)
    weights["head"] = np.ascontiguousarray(weights["tokens"].T)
    weights["last"] = np.array([-1])
    weights["thirds"] = np.array([task.embedding_dim] * 3)
    graph = _Graph(weights)
    head_dim = task.embedding_dim // task.num_heads
    inputs = [(name, TensorProto.INT64, [1, "T"]) for name in ("ids", "places")]
    outputs = [("logits", TensorProto.FLOAT, [1, 1, task.vocab_size])]

    def cache(name, *leading):
        shape = [*leading, 1, task.num_heads]
        past = [*shape, "S", head_dim]
        inputs.append((f"past_{name}", TensorProto.FLOAT, past))
        present = [*shape, "S+T", head_dim]
        outputs.append((f"present_{name}", TensorProto.FLOAT, present))
        return f"past_{name}", f"present_{name}"

    def attend(x, layer):
        options = {"num_heads": task.num_heads, "unidirectional": 1}
        name = f"attended_{layer}"
        if attention == "Attention":
            past, present = cache(layer, 2)
            operands = [x, f"qkv_{layer}", f"qkv_bias_{layer}", "", past]
            return graph.add("Attention", operands, [name, present], **options)
        keys, values = cache(f"keys_{layer}"), cache(f"values_{layer}")
        parts = [f"{part}_{layer}" for part in ("q", "k", "v")]
        qkv = graph.dense(x, "qkv", layer)
        graph.add("Split", [qkv, "thirds"], parts, fused=False, axis=-1)
        operands = [*parts, "", "", "", keys[0], values[0]]
        results = [name, keys[1], values[1]]
        return graph.add("MultiHeadAttention", operands, results, **options)

    x = graph.add(
        "Add",
        [
            graph.add("Gather", ["tokens", "ids"], fused=False),
            graph.add("Gather", ["positions", "places"], fused=False),
        ],
        fused=False,
    )
    norms = [(f"norm_1_{i}", f"norm_1_bias_{i}") for i in range(task.num_layers)]
    norms.append(("norm", "norm_bias"))
    h = graph.add(
        "LayerNormalization", [x, *norms[0]], fused=False, axis=-1, epsilon=EPSILON
    )
    for layer in range(task.num_layers):
        y = graph.dense(attend(h, layer), "out", layer)
        if layer == task.num_layers - 1:
            x, y = graph.last(x), graph.last(y)
        x, h = graph.add_and_norm(x, y, f"norm_2_{layer}", f"norm_2_bias_{layer}")
        h = graph.add("FastGelu", [graph.dense(h, "up", layer)])
        x, h = graph.add_and_norm(x, graph.dense(h, "down", layer), *norms[layer + 1])
    graph.add("MatMul", [h, "head"], ["logits"], fused=False)
    return helper.make_model(
        helper.make_graph(
            graph.nodes,
            "gpt2",
            [helper.make_tensor_value_info(*value) for value in inputs],
            [helper.make_tensor_value_info(*value) for value in outputs],
            graph.constants,
        ),
        opset_imports=[
            helper.make_opsetid("", 17),
            helper.make_opsetid("com.microsoft", 1),
        ],
        ir_version=10,
    )


def _onnx_step(path, task, threads):
    """A plain `run`: binding inputs and outputs, or sharing one buffer of 1024 tokens
    between past and present (GroupQueryAttention), was not faster."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"]
    )
    empty = {
        value.name: np.zeros([0 if size == "S" else size for size in value.shape], "f4")
        for value in session.get_inputs()
        if value.name.startswith("past_")
    }
    names = [value.name for value in session.get_outputs()]
    past = {}

    def step(tokens, position):
        nonlocal past
        if position == 0:
            past = empty
        logits, *present = session.run(
            names,
            {
                "ids": np.array([tokens]),
                "places": np.arange(position, position + len(tokens))[None],
                **past,
            },
        )
        past = dict(zip(empty, present, strict=True))
        return logits

    return step


# llama.cpp


def llama_cpp_q8_0(task, threads, folder):
    return _llama_cpp(task, threads, folder, "q8_0")


def llama_cpp_q4_0(task, threads, folder):
    """The head is q6_K, as llama.cpp's quantiser chooses; the rest is q4_0."""
    return _llama_cpp(task, threads, folder, "q4_0")


def _llama_cpp(task, threads, folder, kind):
    return llama_file(quantized_gguf(task, folder, kind), task, threads)


def llama_file(path, task, threads):
    """Run a GGUF of any origin in llama.cpp."""
    llama, context = llama_context(path, task.context_length, threads)
    memory = llama.llama_get_memory(context)

    def step(tokens, position):
        if position == 0:
            llama.llama_memory_clear(memory, False)
        ids = (llama.llama_token * len(tokens))(*tokens)
        status = llama.llama_decode(context, llama.llama_batch_get_one(ids, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = llama.llama_get_logits_ith(context, -1)
        return np.ctypeslib.as_array(logits, (task.vocab_size,))

    return _repeat(task, step)


def llama_cpp_batch(task, threads, folder, kind, texts):
    """Return functions that begin a text, and that continue all by a token each.

    The first takes the text's number and its tokens, and clears all with number 0;
    the second takes a token of each text and their position. Both return logits.
    """
    path = quantized_gguf(task, folder, kind)
    llama, context = llama_context(path, task.context_length, threads, texts)
    memory = llama.llama_get_memory(context)
    batch = llama.llama_batch_init(task.context_length, 0, 1)

    def run(entries, wanted):
        for index, (text, token, position) in enumerate(entries):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, text
            batch.logits[index] = index in wanted
        batch.n_tokens = len(entries)
        status = llama.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        rows = [llama.llama_get_logits_ith(context, index) for index in wanted]
        return np.stack(
            [np.ctypeslib.as_array(row, (task.vocab_size,)) for row in rows]
        )

    def start(text, prompt):
        if text == 0:
            llama.llama_memory_clear(memory, False)
        entries = [(text, token, place) for place, token in enumerate(prompt)]
        return run(entries, [len(prompt) - 1])[0]

    def decode(tokens, position):
        entries = [(text, token, position) for text, token in enumerate(tokens)]
        return run(entries, range(len(tokens)))

    return start, decode


def llama_context(path, length, threads, texts=1):
    """Return the library, and a context of llama.cpp for so many texts."""
    llama = import_or_not_here("llama_cpp")
    llama.llama_log_set(_silence(), None)
    model = llama.llama_model_load_from_file(
        str(path).encode(), llama.llama_model_default_params()
    )
    parameters = llama.llama_context_default_params()
    parameters.n_ctx = length
    parameters.n_seq_max = texts
    parameters.n_threads = parameters.n_threads_batch = threads
    parameters.no_perf = True
    return llama, llama.llama_init_from_model(model, parameters)


@functools.cache
def _silence():
    """Return a callback that ignores messages; llama.cpp keeps only its address."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


def quantized_gguf(task, folder, kind):
    import_or_not_here("llama_cpp")
    import_or_not_here("gguf")

    def write(path):
        source = _kept(folder, "f32.gguf", task, functools.partial(_write_gguf, task))
        llama_quantize(source, path, f"MOSTLY_{kind.upper()}")

    return _kept(folder, f"{kind}.gguf", task, write)


def llama_quantize(source, path, kind):
    """Write a GGUF as another kind of llama.cpp's, `MOSTLY_Q8_0` for example."""
    import ctypes

    llama = import_or_not_here("llama_cpp")
    llama.llama_log_set(_silence(), None)
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama, f"LLAMA_FTYPE_{kind}")
    parameters.allow_requantize = True
    status = llama.llama_model_quantize(
        str(source).encode(), str(path).encode(), ctypes.byref(parameters)
    )
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status}")


def _write_gguf(task, path):
    import gguf

    weights = random_weights(task)
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(task.context_length)
    writer.add_embedding_length(task.embedding_dim)
    writer.add_block_count(task.num_layers)
    writer.add_feed_forward_length(4 * task.embedding_dim)
    writer.add_head_count(task.num_heads)
    writer.add_layer_norm_eps(EPSILON)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{token}" for token in range(task.vocab_size)])
    writer.add_token_merges(["t 0"])
    writer.add_tensor("token_embd.weight", weights["tokens"])
    writer.add_tensor("position_embd.weight", weights["positions"])
    writer.add_tensor("output_norm.weight", weights["norm"])
    writer.add_tensor("output_norm.bias", weights["norm_bias"])
    names = {
        "norm_1": "attn_norm",
        "qkv": "attn_qkv",
        "out": "attn_output",
        "norm_2": "ffn_norm",
        "up": "ffn_up",
        "down": "ffn_down",
    }
    for layer in range(task.num_layers):
        for ours, theirs in names.items():
            kernel = np.ascontiguousarray(weights[f"{ours}_{layer}"].T)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", kernel)
            bias = weights[f"{ours}_bias_{layer}"]
            writer.add_tensor(f"blk.{layer}.{theirs}.bias", bias)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# LiteRT-LM


def litert_lm(task, threads, folder, model_path):
    """LiteRT-LM's engine on a `.litertlm` file of this shape, by its own benchmark.

    It reports the mean over the further tokens. Each repetition loads the model anew;
    the folder keeps its packed weights.
    """
    import_or_not_here("litert_lm")
    import litert_lm

    if not Path(model_path).exists():
        raise NotHere(f"there is no {Path(model_path).name}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    litert_lm.set_min_log_severity(litert_lm.LogSeverity.SILENT)
    benchmark = litert_lm.Benchmark(
        str(model_path),
        litert_lm.Backend.CPU(thread_count=threads),
        prefill_tokens=task.prompt_tokens,
        decode_tokens=task.new_tokens,
        max_num_tokens=task.context_length,
        cache_dir=str(folder),
    )

    def once():
        info = benchmark.run()
        return _times(
            info.time_to_first_token_in_second, [1 / info.last_decode_tokens_per_second]
        )

    return lambda count: [once() for _ in range(count)]


# Keras


def gpt_tf_keras(task, threads, folder):
    """`gpt_tf.generate`, float32; its cache is as long as prompt and answer."""
    _limit_tensorflow(threads)
    import gpt_tf

    model = gpt_tf_model(task)
    prompt = [int(token) for token in task.prompt()]

    def once():
        times = [time.perf_counter()]
        options = {"max_new_tokens": task.new_tokens, "temperature": 0, "stream": True}
        for _ in gpt_tf.generate(model, prompt, **options):
            times.append(time.perf_counter())
        seconds = np.diff(times)
        return _times(seconds[0], seconds[1:])

    return lambda count: [once() for _ in range(count)]


def keras_hub(task, threads, folder):
    """KerasHub's `generate`, float32; its cache is as long as prompt and answer.

    It tells nothing before it has finished, so a further token's time is a
    difference: all the tokens' less the first one's.
    """
    _limit_tensorflow(threads)
    model = keras_hub_gpt2(task)
    model.compile(sampler="greedy")

    def generate(new_tokens):
        total = task.prompt_tokens + new_tokens
        tokens = np.zeros((1, total), "int32")
        tokens[0, : task.prompt_tokens] = task.prompt()
        padding = np.arange(total)[None] < task.prompt_tokens
        began = time.perf_counter()
        inputs = {"token_ids": tokens, "padding_mask": padding}
        model.generate(inputs, stop_token_ids=None)
        return time.perf_counter() - began

    def once():
        first = generate(1)
        further = (generate(task.new_tokens) - first) / (task.new_tokens - 1)
        return _times(first, [further])

    return lambda count: [once() for _ in range(count)]


def _limit_tensorflow(threads):
    tensorflow = import_or_not_here("tensorflow")
    tensorflow.config.threading.set_intra_op_parallelism_threads(threads)
    tensorflow.config.threading.set_inter_op_parallelism_threads(1)


# PyTorch


def torch_float32(task, threads, folder):
    return _torch(task, threads, int8=False)


def torch_int8(task, threads, folder):
    """Every linear layer through PyTorch's dynamic quantisation."""
    return _torch(task, threads, int8=True)


def _torch(task, threads, int8):
    torch = import_torch()
    from torch import nn

    torch.set_num_threads(threads)
    weights = {k: torch.from_numpy(w) for k, w in random_weights(task).items()}

    def linear(kernel, bias=None):
        layer = nn.Linear(*kernel.shape, bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(kernel.T.contiguous())
        layer.bias = None if bias is None else nn.Parameter(bias)
        return layer

    dense = nn.ModuleDict(
        {
            f"{name}_{layer}": linear(
                weights[f"{name}_{layer}"], weights[f"{name}_bias_{layer}"]
            )
            for name in ("qkv", "out", "up", "down")
            for layer in range(task.num_layers)
        }
    )
    dense["head"] = linear(weights["tokens"].T)
    if int8:
        dense = torch.ao.quantization.quantize_dynamic(
            dense, {nn.Linear}, dtype=torch.qint8
        )
    step = torch.inference_mode()(_torch_step(task, weights, dense))
    return _repeat(task, step)


def _torch_step(task, weights, dense):
    import torch
    import torch.nn.functional as functional

    width = task.embedding_dim
    shape = (1, task.num_heads, task.context_length, width // task.num_heads)
    caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(task.num_layers)]

    def norm(x, name, layer=""):
        scale, bias = weights[f"{name}{layer}"], weights[f"{name}_bias{layer}"]
        return functional.layer_norm(x, [width], scale, bias, EPSILON)

    def step(tokens, position):
        end = position + len(tokens)
        x = weights["tokens"][tokens] + weights["positions"][position:end]  # (T, C)
        for layer, (keys, values) in enumerate(caches):
            qkv = dense[f"qkv_{layer}"](norm(x, "norm_1", f"_{layer}"))
            split = qkv.view(1, len(tokens), 3, task.num_heads, -1)
            q, k, v = split.permute(2, 0, 3, 1, 4)  # (1, T, 3, H, D) -> (1, H, T, D)
            keys[:, :, position:end] = k
            values[:, :, position:end] = v
            attended = functional.scaled_dot_product_attention(
                q, keys[:, :, :end], values[:, :, :end], is_causal=position == 0
            )
            attended = attended.transpose(1, 2).reshape(len(tokens), width)
            x = x + dense[f"out_{layer}"](attended)
            h = dense[f"up_{layer}"](norm(x, "norm_2", f"_{layer}"))
            h = functional.gelu(h, approximate="tanh")
            x = x + dense[f"down_{layer}"](h)
        return dense["head"](norm(x[-1:], "norm")).numpy()

    return step


# In turn

PEERS = {
    "ONNX Runtime int8": onnx_runtime_int8,
    "ONNX Runtime int4": onnx_runtime_int4,
    "llama.cpp q8_0": llama_cpp_q8_0,
    "llama.cpp q4_0": llama_cpp_q4_0,
    "gpt_tf in Keras": gpt_tf_keras,
    "KerasHub": keras_hub,
    "PyTorch": torch_float32,
    "PyTorch int8": torch_int8,
}


class TokenSeconds(float):
    """A further token's seconds, which `harness.take_turns` takes for the measurement;
    `first_token_seconds` comes along."""

    first_token_seconds: float


def contender(name, make, *arguments):
    """Return a `Contender` of a function that makes a peer."""
    return Contender(name, _make_repeat, (make, arguments))


def _make_repeat(make, arguments):
    repeat = make(*arguments)

    def as_seconds(measured):
        seconds = TokenSeconds(measured["decode_seconds"])
        seconds.first_token_seconds = measured["first_token_seconds"]
        return seconds

    return lambda count: [as_seconds(measured) for measured in repeat(count)]


def summary(measured):
    """Return what `take_turns` found about a peer, medians over the repetitions."""
    if measured.failure:
        return {"name": measured.name, "failure": measured.failure}
    firsts = [seconds.first_token_seconds for seconds in measured.seconds]
    return {
        "name": measured.name,
        "tokens_per_second": 1e3 / measured.median_ms,
        "first_token_ms": float(np.median(firsts)) * 1e3,
        "fastest_tokens_per_second": 1 / min(measured.seconds),
        "fastest_first_token_ms": min(firsts) * 1e3,
        "repetitions": len(measured.seconds),
    }
