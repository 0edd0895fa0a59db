"""Whether an LLM fits on a card, or in memory: the arithmetic, each summand by its name. Pure.

What llama.cpp allocates, as its sources have it: the weights of a layer lie where the layer is computed, so do its KV
cache and its state; the embedding table stays in RAM; what computes has a buffer for one step of a prompt.
"""

from collections.abc import Mapping
from typing import NamedTuple

from infra.models.header import Header, Value

# llama.cpp's n_ubatch: tokens of a prompt that are computed in one step.
_STEP = 512
# Keys and values are kept as 16-bit floats, the state of Mamba's layers as 32-bit ones.
_F16, _F32 = 2, 4
# llama.cpp rounds what it keeps of a context up to this many tokens.
_PAD = 256
# CUDA's context and llama.cpp's kernels: 250 to 500 MB of a card that has nothing on it yet, by what people report.
CUDA = 400 * 2**20

# Of every so many layers only the last one sees the whole context (llama.cpp's set_swa_pattern); where a file or
# this table does not say, each layer is counted as if it did.
_WINDOW_EVERY = {"gemma3": 6, "gemma2": 2, "gpt-oss": 2, "cohere2": 4}


class Layer(NamedTuple):
    """One layer of a model."""

    weights: int
    """Bytes."""
    kv: int = 0
    """Bytes of KV cache a token; 0 for a layer without attention."""
    window: int = 0
    """Tokens that its attention looks back; 0: the whole context."""
    state: int = 0
    """Bytes of state a slot, of layers as Mamba's."""


class Shape(NamedTuple):
    """What of a model decides how much memory it takes."""

    layers: tuple[Layer, ...]
    embedding: int
    """Bytes of the table of tokens."""
    output: int
    """Bytes of what turns the last layer into tokens."""
    tied: bool
    """Whether the table of tokens is that, too: then it lies twice where the last layer is on a card."""
    vocabulary: int
    width: int


class Asked(NamedTuple):
    """How the server is to run: the settings `llm.context_size`, `llm.slots`, `llm.gpu_layers`."""

    context: int
    slots: int = 1
    gpu_layers: int = -1
    """-1: as many as fit. The output counts as the last of them."""


class Room(NamedTuple):
    """What is free, bytes."""

    ram: int
    card: int | None = None
    """None: there is no card."""
    name: str = ""
    """What the card is called."""


class Need(NamedTuple):
    """What has to lie in one place, and whether it does."""

    place: str
    summands: Mapping[str, int]
    """Bytes, by what they are for."""
    free: int

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.summands.values())

    def __str__(self) -> str:
        parts = " + ".join(f"{name} {_size(size)}" for name, size in self.summands.items())
        return f"{parts} = {_size(self.total)} on {self.place}, where {_size(self.free)} are free"


class Fit(NamedTuple):
    """Whether a model fits."""

    needs: tuple[Need, ...]
    gpu_layers: int
    """How many layers, the output among them, lie on the card."""
    of: int
    """How many there are."""

    @property
    def ok(self) -> bool:
        """Whether every place has room."""
        return all(need.total <= need.free for need in self.needs)


def shape_of(header: Header) -> Shape:
    """The shape of the model with this header."""
    values, tensors = header.values, header.tensors
    kind = str(values.get("general.architecture", ""))
    count = _number(values, f"{kind}.block_count")
    inside: list[int] = [0] * count
    for name, size in tensors.items():
        first, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        if first == "blk" and number.isdigit() and int(number) < count:
            inside[int(number)] += size
    embedding = tensors.get("token_embd.weight", 0)
    outside = sum(tensors.values()) - sum(inside) - embedding
    tied = "output.weight" not in tensors
    layers = tuple(
        Layer(inside[n], *_attention(values, kind, n, tensors), _state(values, kind, n, tensors)) for n in range(count)
    )
    vocabulary = _number(values, "tokenizer.ggml.tokens.length") or _number(values, f"{kind}.vocab_size")
    width = _number(values, f"{kind}.embedding_length")
    return Shape(layers, embedding, outside + embedding * tied, tied, vocabulary, width)


def fits(shape: Shape, asked: Asked, room: Room) -> Fit:
    """Where the model would lie, and whether there is room.

    With `gpu_layers` -1 as many layers are on the card as fit there: what llama.cpp does by itself.
    """
    slots = len(shape.layers) + 1
    if room.card is None or asked.gpu_layers == 0:
        return Fit((_ram(shape, asked, room, 0),), 0, slots)
    if asked.gpu_layers > 0:
        number = min(asked.gpu_layers, slots)
        return Fit((_card(shape, asked, room, number), _ram(shape, asked, room, number)), number, slots)
    for number in range(slots, 0, -1):
        card = _card(shape, asked, room, number)
        if card.total <= card.free:
            return Fit((card, _ram(shape, asked, room, number)), number, slots)
    return Fit((_ram(shape, asked, room, 0),), 0, slots)


def why_not(fit: Fit) -> str:
    """The arithmetic of each place that has no room."""
    return "; ".join(f"it does not fit: {need}" for need in fit.needs if need.total > need.free)


def ways(fit: Fit, asked: Asked) -> str:
    """The settings that change it."""
    found = [f"lower llm.context_size ({asked.context})"] if any("KV cache" in n.summands for n in fit.needs) else []
    if asked.gpu_layers > 0 and fit.gpu_layers:
        found.append(f"lower llm.gpu_layers ({asked.gpu_layers} of {fit.of}; -1 takes as many as fit)")
    elif asked.gpu_layers == 0:
        found.append("raise llm.gpu_layers (0) where there is a card")
    found.append("take a smaller quantisation (`rewatch models pull MODEL --quant Q3_K_M`)")
    return ", ".join([*found, "or a smaller model (`rewatch models ls`), or set llm.url to a server elsewhere"])


def refusal(fit: Fit, asked: Asked) -> str:
    """Why it does not fit, and what changes that."""
    return f"{why_not(fit)}; {ways(fit, asked)}"


def where(fit: Fit) -> str:
    """What lies where, for people."""
    if not fit.gpu_layers:
        return f"in {fit.needs[0].place}, {_size(fit.needs[0].total)}"
    card = fit.needs[0]
    return f"{fit.gpu_layers} of {fit.of} layers on {card.place}, {_size(card.total)} of {_size(card.free)} free"


def _card(shape: Shape, asked: Asked, room: Room, number: int) -> Need:
    """The last `number` layers, of which the output is the very last."""
    stay = len(shape.layers) + 1 - number
    there, here = shape.layers[stay:], shape.layers[:stay]
    # For prompts the layers in RAM are computed on the card all the same, and their weights are brought there in turn.
    brought = max((layer.weights for layer in here), default=0)
    return Need(
        room.name or "the card",
        _drop_zeros(
            {
                f"weights of {number} of {len(shape.layers) + 1} layers": sum(layer.weights for layer in there)
                + shape.output,
                "KV cache": _kv(there, asked),
                "state": _state_of(there, asked),
                "buffers": _buffers(shape) + brought,
                "CUDA": CUDA,
            }
        ),
        room.card or 0,
    )


def _ram(shape: Shape, asked: Asked, room: Room, number: int) -> Need:
    stay = len(shape.layers) + 1 - number if number else len(shape.layers)
    here = shape.layers[:stay]
    weights = sum(layer.weights for layer in here) + shape.embedding
    if not number:
        weights += shape.output - shape.embedding * shape.tied  # tied, it is one table here
    return Need(
        "this machine's memory",
        _drop_zeros(
            {
                "weights": weights,
                "KV cache": _kv(here, asked),
                "state": _state_of(here, asked),
                "buffers": _buffers(shape) if not number else 0,
            }
        ),
        room.ram,
    )


def _buffers(shape: Shape) -> int:
    """For one step of a prompt: a score for each token of the vocabulary, and what one layer hands to the next."""
    return _STEP * (shape.vocabulary + shape.width) * _F32


def _kv(layers: tuple[Layer, ...], asked: Asked) -> int:
    whole = _padded(asked.context)
    return sum(
        # Beyond its window a layer keeps what one step of each slot adds.
        layer.kv * (min(whole, _padded((layer.window + _STEP) * asked.slots)) if layer.window else whole)
        for layer in layers
    )


def _state_of(layers: tuple[Layer, ...], asked: Asked) -> int:
    return sum(layer.state for layer in layers) * asked.slots


def _attention(values: Mapping[str, Value], kind: str, layer: int, tensors: Mapping[str, int]) -> tuple[int, int]:
    """Bytes of KV cache a token, and the window. Layers that only have Mamba or experts keep nothing."""
    if not any(f"blk.{layer}.{name}.weight" in tensors for name in ("attn_k", "attn_qkv", "attn_kv_a_mqa")):
        return 0, 0
    heads = _number(values, f"{kind}.attention.head_count", layer)
    kept = _number(values, f"{kind}.attention.head_count_kv", layer) or heads
    per_head = _number(values, f"{kind}.embedding_length") // max(1, heads)
    key = _number(values, f"{kind}.attention.key_length") or per_head
    value = _number(values, f"{kind}.attention.value_length") or per_head
    every = _WINDOW_EVERY.get(kind, 0)
    looks_back = every and (layer + 1) % every
    return kept * (key + value) * _F16, _number(values, f"{kind}.attention.sliding_window") if looks_back else 0


def _state(values: Mapping[str, Value], kind: str, layer: int, tensors: Mapping[str, int]) -> int:
    """Bytes a slot: Mamba's state, and the inputs that its convolution still needs."""
    if f"blk.{layer}.ssm_conv1d.weight" not in tensors:
        return 0
    inner, state, groups, kernel = (
        _number(values, f"{kind}.ssm.{name}") for name in ("inner_size", "state_size", "group_count", "conv_kernel")
    )
    return (inner * state + max(0, kernel - 1) * (inner + 2 * groups * state)) * _F32


def _number(values: Mapping[str, Value], name: str, layer: int = 0) -> int:
    """A setting; of one that has a value a layer this layer's. 0 where there is none."""
    found = values.get(name, 0)
    if isinstance(found, tuple):
        found = found[layer] if layer < len(found) else 0
    return int(found) if isinstance(found, int | float) else 0


def _padded(tokens: int) -> int:
    return -(-tokens // _PAD) * _PAD


def _drop_zeros(summands: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in summands.items() if size}


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
