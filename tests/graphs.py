"""Small OpenVINO graphs of the kinds that real networks are made of, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import openvino as ov
import openvino.opset13 as op
from openvino._offline_transformations import apply_moc_transformations

from vinoopt.compression.groups import Coupling
from vinoopt.compression.surgery import apply_pruning, verify_pruning, zeroed_reference
from vinoopt.records import GroupWidth, PruningGroup

Value: TypeAlias = "ov.Output | ov.Node"
TOLERANCE = 1e-4  # float32 rounding of reordered sums stays two orders below


class Net:
    """Writes a graph: each method adds a layer with random weights and a name."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.count = 0

    def const(self, *shape: int, scale: float = 1.0, name: str | None = None) -> ov.Node:
        node = op.constant((self.rng.normal(size=shape) * scale).astype(np.float32))
        if name:
            node.set_friendly_name(name)
        return node

    def ints(self, *values: int) -> ov.Node:
        return op.constant(np.asarray(values, np.int64))

    def named(self, node: ov.Node, name: str | None) -> ov.Node:
        self.count += 1
        node.set_friendly_name(name or f"{node.get_type_name().lower()}{self.count}")
        return node

    def input(self, *shape: int, name: str = "x", dtype: type = np.float32) -> ov.Node:
        node = op.parameter(list(shape), dtype, name=name)
        node.output(0).set_names({name})
        return node

    def conv(
        self,
        x: Value,
        out: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        name: str | None = None,
        bias: bool = True,
    ) -> ov.Node:
        channels = channels_of(x)
        weight = self.const(out, channels, kernel, kernel, scale=1 / np.sqrt(channels * kernel**2))
        pad = kernel // 2
        node = op.convolution(x, weight, [stride] * 2, [pad] * 2, [pad] * 2, [1, 1])
        node = self.named(node, name)
        return op.add(node, self.const(1, out, 1, 1)) if bias else node

    def group_conv(
        self, x: Value, groups: int, out: int | None = None, *, kernel: int = 3, name: str | None = None
    ) -> ov.Node:
        channels = channels_of(x)
        out = out or channels
        weight = self.const(groups, out // groups, channels // groups, kernel, kernel, scale=0.4)
        pad = kernel // 2
        node = op.group_convolution(x, weight, [1, 1], [pad] * 2, [pad] * 2, [1, 1])
        return op.add(self.named(node, name), self.const(1, out, 1, 1))

    def dense(self, x: Value, out: int, *, name: str | None = None, bias: bool = True) -> ov.Node:
        features = last_of(x)
        weight = self.const(out, features, scale=1 / np.sqrt(features))
        node = self.named(op.matmul(x, weight, False, True), name)
        return op.add(node, self.const(out)) if bias else node

    def head(self, x: Value, classes: int = 5, *, name: str = "head") -> ov.Node:
        pooled = op.reduce_mean(x, self.ints(2, 3), False)
        return self.dense(pooled, classes, name=name)

    def layer_norm(self, x: Value) -> ov.Node:
        normed = op.mvn(x, self.ints(-1), True, 1e-5, "inside_sqrt")
        size = last_of(x)
        return op.add(op.multiply(normed, self.const(size)), self.const(size))


def channels_of(x: Value) -> int:
    output = x.output(0) if isinstance(x, ov.Node) else x
    return int(output.get_partial_shape()[1].get_length())


def last_of(x: Value) -> int:
    output = x.output(0) if isinstance(x, ov.Node) else x
    shape = output.get_partial_shape()
    return int(shape[len(shape) - 1].get_length())


def model(outputs: Sequence[Value], inputs: Sequence[ov.Node], *, moc: bool = True) -> ov.Model:
    made = ov.Model(list(outputs), list(inputs), "net")
    if moc:
        apply_moc_transformations(made, cf=True)
    return made


# --------------------------------------------------------------------------- the graphs


def chain(batch: int = -1) -> ov.Model:
    net = Net()
    x = net.input(batch, 3, 12, 12)
    y = op.relu(net.conv(x, 8, name="c1"))
    y = op.max_pool(y, [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0)
    y = op.relu(net.conv(y, 12, name="c2"))
    return model([net.head(y)], [x])


def flatten_head(batch: int = -1) -> ov.Model:
    net = Net()
    x = net.input(batch, 3, 6, 6)
    y = op.relu(net.conv(x, 8, name="c1"))
    y = op.reshape(y, net.ints(0, -1), True)
    y = op.relu(net.dense(y, 10, name="f1"))
    return model([net.dense(y, 4, name="f2")], [x])


def residual() -> ov.Model:
    net = Net()
    x = net.input(-1, 3, 12, 12)
    y = op.relu(net.conv(x, 8, name="stem"))
    for number in range(2):
        z = op.relu(net.conv(y, 6, name=f"a{number}"))
        y = op.relu(op.add(net.conv(z, 8, name=f"b{number}"), y))
    z = net.conv(op.relu(net.conv(y, 16, stride=2, name="down")), 16, name="down2")
    y = op.relu(op.add(z, net.conv(y, 16, 1, stride=2, name="short")))
    return model([net.head(y)], [x])


def option_a() -> ov.Model:
    """ResNet's parameter-free shortcut: every second pixel, channels padded with zeros."""
    net = Net()
    x = net.input(-1, 3, 12, 12)
    y = op.relu(net.conv(x, 8, name="stem"))
    z = net.conv(op.relu(net.conv(y, 16, stride=2, name="a")), 16, name="b")
    short = op.strided_slice(
        y, net.ints(0, 0, 0, 0), net.ints(0, 0, 0, 0), net.ints(1, 1, 2, 2), [1] * 4, [1] * 4
    )
    short = op.pad(short, net.ints(0, 4, 0, 0), net.ints(0, 4, 0, 0), "constant", op.constant(np.float32(0)))
    return model([net.head(op.relu(op.add(z, short)))], [x])


def depthwise() -> ov.Model:
    net = Net()
    x = net.input(-1, 3, 10, 10)
    y = op.clamp(net.conv(x, 8, name="stem"), 0, 6)
    y = op.clamp(net.group_conv(y, 8, name="dw"), 0, 6)
    y = op.hswish(net.conv(y, 12, 1, name="pw"))
    y = op.relu(net.group_conv(y, 12, 24, name="dw2"))
    return model([net.head(y)], [x])


def inverted_residual(*, squeeze: bool = True) -> ov.Model:
    net = Net()
    x = net.input(-1, 3, 10, 10)
    y = op.relu(net.conv(x, 6, name="stem"))
    for number in range(2):
        z = op.hswish(net.conv(y, 18, 1, name=f"expand{number}"))
        z = op.hswish(net.group_conv(z, 18, name=f"dw{number}"))
        if squeeze:
            gate = op.reduce_mean(z, net.ints(2, 3), True)
            gate = op.relu(net.conv(gate, 5, 1, name=f"squeeze{number}"))
            gate = op.hsigmoid(net.conv(gate, 18, 1, name=f"excite{number}"))
            z = op.multiply(z, gate)
        y = op.add(net.conv(z, 6, 1, name=f"project{number}"), y)
    return model([net.head(y)], [x])


def dense_net() -> ov.Model:
    net = Net()
    x = net.input(-1, 3, 10, 10)
    y = net.conv(x, 8, name="stem")
    for number in range(3):
        z = op.relu(
            op.add(op.multiply(y, net.const(1, channels_of(y), 1, 1)), net.const(1, channels_of(y), 1, 1))
        )
        z = op.relu(net.conv(z, 12, 1, name=f"neck{number}"))
        y = op.concat([y, net.conv(z, 4, name=f"grow{number}")], 1)
    y = op.avg_pool(net.conv(y, 10, 1, name="transition"), [2, 2], [0, 0], [0, 0], [2, 2], True)
    return model([net.head(y)], [x])


def fire() -> ov.Model:
    net = Net()
    x = net.input(-1, 3, 10, 10)
    y = op.relu(net.conv(x, 8, name="stem"))
    for number in range(2):
        s = op.relu(net.conv(y, 4, 1, name=f"squeeze{number}"))
        y = op.concat(
            [op.relu(net.conv(s, 6, 1, name=f"e1{number}")), op.relu(net.conv(s, 7, name=f"e3{number}"))], 1
        )
    return model([op.softmax(net.head(y), 1)], [x])


def channel_shuffle() -> ov.Model:
    """ShuffleNet V2: half of the channels pass, the halves are shuffled by reshape, transpose, reshape."""
    net = Net()
    x = net.input(-1, 3, 8, 8)
    y = op.relu(net.conv(x, 16, name="stem"))
    for number in range(2):
        left, right = op.split(y, op.constant(np.int64(1)), 2).outputs()
        z = op.relu(net.conv(right, 8, 1, name=f"in{number}"))
        z = op.relu(net.conv(net.group_conv(z, 8, name=f"dw{number}"), 8, 1, name=f"out{number}"))
        y = op.concat([left, z], 1)
        y = op.reshape(y, net.ints(0, 2, 8, 8, 8), True)
        y = op.transpose(y, net.ints(0, 2, 1, 3, 4))
        y = op.reshape(y, net.ints(0, 16, 8, 8), True)
    return model([net.head(op.relu(net.conv(y, 12, 1, name="last")))], [x])


def grouped() -> ov.Model:
    net = Net()
    x = net.input(-1, 3, 8, 8)
    y = op.relu(net.conv(x, 16, name="stem"))
    z = op.relu(net.conv(y, 24, 1, name="reduce"))
    z = op.relu(net.group_conv(z, 6, name="groups"))
    y = op.relu(op.add(net.conv(z, 16, 1, name="expand"), y))
    return model([net.head(y)], [x])


def shuffled_groups() -> ov.Model:
    """ShuffleNet V1: grouped 1x1 convolutions with shuffles between."""
    net = Net()
    x = net.input(-1, 3, 8, 8)
    y = op.relu(net.conv(x, 36, name="stem"))
    for number in range(2):
        z = op.relu(net.group_conv(y, 3, 36, kernel=1, name=f"g1{number}"))
        z = op.shuffle_channels(z, 1, 3)
        z = net.group_conv(z, 36, name=f"dw{number}")
        y = op.relu(op.add(net.group_conv(z, 3, 36, kernel=1, name=f"g2{number}"), y))
    return model([net.head(y)], [x])


def inception() -> ov.Model:
    net = Net()
    x = net.input(-1, 3, 8, 8)
    y = op.relu(net.conv(x, 8, name="stem"))
    a = op.relu(net.conv(y, 4, 1, name="a"))
    b = op.relu(net.conv(op.relu(net.conv(y, 6, 1, name="b1")), 8, name="b2"))
    pooled = op.max_pool(y, [1, 1], [1, 1], [1, 1], [1, 1], [3, 3]).output(0)
    c = op.relu(net.conv(pooled, 5, 1, name="c"))
    y = op.concat([a, b, c, y], 1)
    return model([net.head(op.relu(net.conv(y, 10, 1, name="join")))], [x])


def unet() -> ov.Model:
    net = Net()
    x = net.input(-1, 3, 16, 16)
    down = op.relu(net.conv(x, 8, name="enc1"))
    low = op.relu(
        net.conv(op.max_pool(down, [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0), 12, name="enc2")
    )
    up = op.convolution_backprop_data(low, net.const(12, 8, 2, 2, scale=0.3), [2, 2])
    up.set_friendly_name("up")
    resized = op.interpolate(low, net.ints(16, 16), "nearest", "sizes", axes=net.ints(2, 3))
    y = op.concat([op.add(up, net.const(1, 8, 1, 1)), down, resized], 1)
    y = op.relu(net.conv(y, 10, name="dec"))
    return model([op.sigmoid(net.conv(y, 2, 1, name="mask"))], [x])


def two_inputs_two_outputs() -> ov.Model:
    net = Net()
    x, z = net.input(-1, 3, 8, 8), net.input(-1, 4, name="z")
    y = op.relu(net.conv(x, 8, name="image"))
    side = op.relu(net.dense(z, 8, name="side"))
    y = op.multiply(y, op.unsqueeze(side, net.ints(2, 3)))
    y = op.relu(net.conv(y, 12, name="both"))
    return model([net.head(y, name="h1"), op.sigmoid(net.head(y, 3, name="h2"))], [x, z])


def shared_weight() -> ov.Model:
    """One constant is the weight of two layers, as in heads over a pyramid."""
    net = Net()
    x = net.input(-1, 3, 8, 8)
    weight, kernel = net.const(8, 8, 3, 3, scale=0.2, name="shared"), net.const(6, 8, 1, 1)
    a = op.relu(net.conv(x, 8, name="a"))
    b = op.relu(net.conv(op.max_pool(a, [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0), 8, name="b"))
    outs = []
    for number, y in enumerate((a, b)):
        first = net.named(op.convolution(y, weight, [1, 1], [1, 1], [1, 1], [1, 1]), f"tower{number}")
        second = net.named(
            op.convolution(op.relu(first), kernel, [1, 1], [0, 0], [0, 0], [1, 1]), f"pred{number}"
        )
        outs.append(op.reshape(op.transpose(second, net.ints(0, 2, 3, 1)), net.ints(0, -1, 6), True))
    return model([op.concat(outs, 1)], [x])


def attention(
    net: Net, x: Value, heads: int, number: int, *, fused: bool = False, dynamic: bool = False
) -> ov.Node:
    """Multi-head attention over [batch, tokens, width], as exporters write it."""
    width = last_of(x)
    size = width // heads

    def parted(value: Value) -> ov.Node:
        if dynamic:
            shape = op.shape_of(value, "i64")
            lead = op.gather(shape, net.ints(0, 1), op.constant(np.int64(0)))
            target = op.concat([lead, net.ints(heads, size)], 0)
        else:
            target = net.ints(0, 0, heads, size)
        return op.transpose(op.reshape(value, target, not dynamic), net.ints(0, 2, 1, 3))

    if fused:
        qkv = op.reshape(net.dense(x, 3 * width, name=f"qkv{number}"), net.ints(0, 0, 3, heads, size), True)
        qkv = op.transpose(qkv, net.ints(2, 0, 3, 1, 4))
        q, k, v = (op.gather(qkv, op.constant(np.int64(i)), op.constant(np.int64(0))) for i in range(3))
    else:
        q, k, v = (parted(net.dense(x, width, name=f"{n}{number}")) for n in "qkv")
    scores = op.multiply(op.matmul(q, k, False, True), op.constant(np.float32(size**-0.5)))
    mixed = op.transpose(op.matmul(op.softmax(scores, -1), v, False, False), net.ints(0, 2, 1, 3))
    if dynamic:
        lead = op.gather(op.shape_of(mixed, "i64"), net.ints(0, 1), op.constant(np.int64(0)))
        mixed = op.reshape(mixed, op.concat([lead, net.ints(width)], 0), False)
    else:
        mixed = op.reshape(mixed, net.ints(0, 0, width), True)
    return net.dense(mixed, width, name=f"proj{number}")


def encoder(net: Net, x: Value, depth: int, heads: int, **options: bool) -> ov.Node:
    y = x
    for number in range(depth):
        y = op.add(attention(net, net.layer_norm(y), heads, number, **options), y)
        hidden = op.gelu(net.dense(net.layer_norm(y), 2 * last_of(y), name=f"fc1{number}"), "erf")
        y = op.add(net.dense(hidden, last_of(y), name=f"fc2{number}"), y)
    return net.layer_norm(y)


def shared_vectors() -> ov.Model:
    """Equal biases stored once: the layers that read them have nothing else in common."""
    net = Net()
    x = net.input(-1, 3, 8, 8)
    y, bias = x, net.const(1, 8, 1, 1)
    for name in "abc":
        y = op.relu(op.add(net.conv(y, 8, name=name, bias=False), bias))
    return model([net.head(y)], [x])


def vit(*, fused: bool = True) -> ov.Model:
    net = Net()
    x = net.input(-1, 3, 16, 16)
    patches = op.convolution(x, net.const(24, 3, 4, 4, scale=0.2), [4, 4], [0, 0], [0, 0], [1, 1])
    y = op.transpose(op.reshape(patches, net.ints(0, 24, 16), True), net.ints(0, 2, 1))
    batch = op.gather(op.shape_of(x, "i64"), net.ints(0), op.constant(np.int64(0)))
    token = op.broadcast(net.const(1, 1, 24), op.concat([batch, net.ints(1, 24)], 0))
    y = op.add(op.concat([token, y], 1), net.const(1, 17, 24))
    y = encoder(net, y, 2, 4, fused=fused)
    first = op.gather(y, op.constant(np.int64(0)), op.constant(np.int64(1)))
    return model([net.dense(first, 5, name="head")], [x])


def bert(depth: int = 2, width: int = 24, heads: int = 4, vocabulary: int = 50) -> ov.Model:
    """Dynamic batch and length; embeddings, positions sliced to the length, pooled output."""
    net = Net()
    ids = net.input(-1, -1, name="ids", dtype=np.int64)
    zero = op.constant(np.int64(0))
    y = op.gather(net.const(vocabulary, width), ids, zero)
    length = op.gather(op.shape_of(ids, "i64"), net.ints(1), zero)
    positions = op.slice(net.const(1, 64, width), net.ints(0), length, net.ints(1), net.ints(1))
    y = encoder(net, net.layer_norm(op.add(y, positions)), depth, heads, dynamic=True)
    pooled = op.tanh(net.dense(op.gather(y, zero, op.constant(np.int64(1))), width, name="pooler"))
    return model([net.dense(pooled, 3, name="head")], [ids])


def sdpa(*, scaled: bool = True) -> ov.Model:
    net = Net()
    x = net.input(-1, 6, 24)
    q, k, v = (
        op.transpose(op.reshape(net.dense(x, 24, name=n), net.ints(0, 0, 4, 6), True), net.ints(0, 2, 1, 3))
        for n in "qkv"
    )
    extra = {
        "attention_mask": op.constant(np.zeros((6, 6), np.float32)),
        "scale": op.constant(np.float32(0.4)),
    }
    y = op.scaled_dot_product_attention(q, k, v, **(extra if scaled else {}))
    y = op.reshape(op.transpose(y, net.ints(0, 2, 1, 3)), net.ints(0, 0, 24), True)
    return model([net.dense(op.add(net.dense(y, 24, name="proj"), x), 5, name="head")], [x])


def grouped_queries() -> ov.Model:
    """Two heads of keys and values serve four heads of queries: they are repeated by broadcast."""
    net = Net()
    x = net.input(-1, 6, 24)

    def parted(name: str, heads: int) -> ov.Node:
        value = op.reshape(net.dense(x, 6 * heads, name=name), net.ints(0, 0, heads, 6), True)
        return op.transpose(value, net.ints(0, 2, 1, 3))

    def repeated(value: ov.Node) -> ov.Node:
        wide = op.broadcast(
            op.unsqueeze(value, net.ints(2)), net.ints(1, 2, 2, 6, 6), broadcast_spec="BIDIRECTIONAL"
        )
        return op.reshape(wide, net.ints(0, 4, 6, 6), True)

    q, k, v = parted("q", 4), repeated(parted("k", 2)), repeated(parted("v", 2))
    scores = op.softmax(op.matmul(q, k, False, True), -1)
    y = op.transpose(op.matmul(scores, v, False, False), net.ints(0, 2, 1, 3))
    y = op.add(net.dense(op.reshape(y, net.ints(0, 0, 24), True), 24, name="proj"), x)
    return model([net.dense(y, 5, name="head")], [x])


def einsum_attention() -> ov.Model:
    net = Net()
    x = net.input(-1, 6, 24)
    q, k, v = (op.reshape(net.dense(x, 32, name=name), net.ints(0, 0, 4, 8), True) for name in "qkv")
    scores = op.softmax(op.einsum([q, k], "bihd,bjhd->bhij"), -1)
    y = op.reshape(op.einsum([scores, v], "bhij,bjhd->bihd"), net.ints(0, 0, 32), True)
    return model([net.dense(op.add(net.dense(y, 24, name="proj"), x), 5, name="head")], [x])


def split_attention() -> ov.Model:
    """ResNeSt: the halves of a grouped convolution's output are weighed against each other and summed."""
    net = Net()
    x = net.input(-1, 3, 8, 8)
    y = op.relu(net.conv(x, 12, name="stem"))
    y = op.relu(net.group_conv(y, 2, 20, name="radix"))
    parts = op.reshape(y, net.ints(0, 2, 10, 8, 8), True)
    pooled = op.reduce_mean(op.reduce_sum(parts, net.ints(1), False), net.ints(2, 3), True)
    gate = net.conv(op.relu(net.conv(pooled, 6, 1, name="fc1")), 20, 1, name="fc2")
    gate = op.softmax(op.reshape(gate, net.ints(0, 2, 10, 1, 1), True), 1)
    y = op.reduce_sum(op.multiply(parts, gate), net.ints(1), False)
    return model([net.head(net.conv(y, 7, 1, name="last"))], [x])


def yolo() -> ov.Model:
    """A detection head: anchors split off by reshape, boxes and scores by split, levels joined."""
    net = Net()
    x = net.input(1, 3, 16, 16)
    y = op.swish(net.conv(x, 8, name="stem"))
    parts = op.variadic_split(y, op.constant(np.int64(1)), net.ints(3, 5)).outputs()
    y = op.concat([*parts, op.swish(net.conv(parts[1], 5, name="c2f"))], 1)
    y = op.swish(net.conv(y, 12, 1, name="fuse"))
    levels = []
    for number in range(2):
        y = op.swish(net.conv(y, 12, stride=2, name=f"down{number}"))
        side = 8 >> number
        out = net.conv(op.swish(net.conv(y, 8, name=f"neck{number}")), 3 * 7, 1, name=f"detect{number}")
        out = op.transpose(op.reshape(out, net.ints(1, 3, 7, side, side), False), net.ints(0, 1, 3, 4, 2))
        xy, wh, score = op.variadic_split(out, op.constant(np.int64(4)), net.ints(2, 2, 3)).outputs()
        boxes = op.concat(
            [op.multiply(op.sigmoid(xy), op.constant(np.float32(8))), op.exp(wh), op.sigmoid(score)], 4
        )
        levels.append(op.reshape(boxes, net.ints(1, -1, 7), False))
    return model([op.concat(levels, 1)], [x])


def text_cnn() -> ov.Model:
    net = Net()
    ids = net.input(-1, 12, name="ids", dtype=np.int64)
    y = op.gather(net.const(40, 16, name="table"), ids, op.constant(np.int64(0)))
    y = op.transpose(y, net.ints(0, 2, 1))
    pooled = []
    for size in (2, 3):
        node = op.convolution(y, net.const(10, 16, size, scale=0.2), [1], [0], [0], [1])
        node = op.relu(op.add(net.named(node, f"conv{size}"), net.const(1, 10, 1)))
        pooled.append(op.reduce_max(node, net.ints(2), False))
    return model([net.dense(op.concat(pooled, 1), 4, name="head")], [ids])


def lstm() -> ov.Model:
    net = Net()
    x = net.input(1, 10, 6)
    y = op.relu(net.dense(op.relu(net.dense(x, 12, name="in1")), 8, name="in2"))
    hidden = 5
    cell = op.lstm_sequence(
        y, net.const(1, 1, hidden), net.const(1, 1, hidden), net.ints(10), net.const(1, 4 * hidden, 8),
        net.const(1, 4 * hidden, hidden), net.const(1, 4 * hidden), hidden, "forward",
    )  # fmt: skip
    y = op.squeeze(cell.output(0), net.ints(1))
    y = op.relu(net.dense(y, 12, name="out1"))
    return model([net.dense(y, 3, name="out2")], [x])


def half_constants() -> ov.Model:
    """Weights stored in half precision behind conversions."""
    net = Net()
    x = net.input(-1, 3, 8, 8)
    y: Value = x
    for number, (inside, out) in enumerate(((3, 8), (8, 12))):
        stored = op.constant((net.rng.normal(size=(out, inside, 3, 3)) * 0.2).astype(np.float16))
        weight = op.convert(stored, "f32")
        y = op.relu(net.named(op.convolution(y, weight, [1, 1], [1, 1], [1, 1], [1, 1]), f"c{number}"))
    return model([net.head(y)], [x], moc=False)


def fake_quantized() -> ov.Model:
    """Quantized before: FakeQuantize per tensor on activations, per channel on weights."""
    net = Net()
    x = net.input(-1, 3, 8, 8)

    def scalar(value: float) -> ov.Node:
        return op.constant(np.full((1, 1, 1, 1), value, np.float32))

    y: Value = x
    for number, (inside, out) in enumerate(((3, 8), (8, 12))):
        y = op.fake_quantize(y, scalar(-4), scalar(4), scalar(-4), scalar(4), 256)
        high = op.constant(np.abs(net.rng.normal(size=(out, 1, 1, 1))).astype(np.float32) + 0.5)
        low = op.constant(-high.get_data())
        weight = op.fake_quantize(net.const(out, inside, 3, 3, scale=0.2), low, high, low, high, 255)
        y = op.relu(net.named(op.convolution(y, weight, [1, 1], [1, 1], [1, 1], [1, 1]), f"c{number}"))
    return model([net.head(y)], [x], moc=False)


def glu() -> ov.Model:
    """Gated feed-forward: one layer makes both halves, a split parts them."""
    net = Net()
    x = net.input(-1, 7, 12)
    gate, up = op.split(net.dense(x, 32, name="in"), op.constant(np.int64(-1)), 2).outputs()
    y = op.add(net.dense(op.multiply(op.swish(gate), up), 12, name="out"), x)
    return model([net.dense(net.layer_norm(y), 4, name="head")], [x])


def pixel_shuffle() -> ov.Model:
    net = Net()
    x = net.input(-1, 3, 8, 8)
    y = op.space_to_depth(op.relu(net.conv(x, 6, name="a")), "blocks_first", 2)
    y = op.relu(net.conv(y, 16, name="b"))
    y = op.depth_to_space(y, "depth_first", 2)
    y = op.prelu(net.conv(y, 8, name="c"), net.const(8))
    z = op.reshape(net.conv(y, 12, name="d"), net.ints(0, 3, 2, 2, 8, 8), True)
    z = op.reshape(op.transpose(z, net.ints(0, 1, 4, 2, 5, 3)), net.ints(0, 3, 16, 16), True)
    return model([z, net.head(y)], [x])


def indexed() -> ov.Model:
    """Channels reordered, sliced, repeated and normed before they are read."""
    net = Net()
    x = net.input(-1, 3, 8, 8)
    y = op.relu(net.conv(x, 12, name="a"))
    order = op.constant(net.rng.permutation(12).astype(np.int64))
    y = op.gather(y, order, op.constant(np.int64(1)))
    low = op.slice(y, net.ints(0), net.ints(5), net.ints(1), net.ints(1))
    high = op.slice(y, net.ints(-7), net.ints(2**31 - 1), net.ints(1), net.ints(1))
    z = op.concat([op.tanh(low), op.abs(high), op.tile(low, net.ints(1, 2, 1, 1))], 1)
    z = op.mvn(z, net.ints(2, 3), True, 1e-5, "inside_sqrt")
    z = op.relu(net.conv(z, 9, 1, name="b"))
    return model([net.head(op.multiply(z, op.softmax(op.reduce_mean(z, net.ints(1), True), 2)))], [x])


def whole_branch_norm() -> ov.Model:
    """A norm over the channels stands in the way of pruning them."""
    net = Net()
    x = net.input(-1, 3, 8, 8)
    y = op.group_normalization(net.conv(x, 8, name="a"), net.const(8), net.const(8), 2, 1e-5)
    y = op.relu(net.conv(op.relu(y), 10, name="b"))
    return model([net.head(y)], [x])


GRAPHS: Mapping[str, Callable[[], ov.Model]] = {
    each.__name__: each
    for each in (
        chain, flatten_head, residual, option_a, depthwise, inverted_residual, dense_net, fire,
        channel_shuffle, grouped, shuffled_groups, inception, unet, two_inputs_two_outputs, shared_weight,
        shared_vectors, vit, bert, sdpa, grouped_queries, einsum_attention,
        split_attention, yolo, text_cnn, lstm, half_constants, fake_quantized, glu, pixel_shuffle,
        indexed, whole_branch_norm,
    )
}  # fmt: skip


# --------------------------------------------------------------------------- pieces for random graphs

Piece = Callable[[Net, ov.Node], ov.Node]


def _activate(net: Net, y: Value) -> ov.Node:
    return (op.relu, op.sigmoid, op.hswish, op.tanh, op.mish)[int(net.rng.integers(5))](y)


def piece_conv(net: Net, y: ov.Node) -> ov.Node:
    return _activate(net, net.conv(y, int(net.rng.integers(2, 13)), int(net.rng.choice([1, 3]))))


def piece_depthwise(net: Net, y: ov.Node) -> ov.Node:
    channels = channels_of(y)
    return _activate(net, net.group_conv(y, channels, channels * int(net.rng.integers(1, 3))))


def piece_grouped(net: Net, y: ov.Node) -> ov.Node:
    groups = int(net.rng.choice([2, 3]))
    y = op.relu(net.conv(y, groups * 4, 1))
    return net.group_conv(y, groups, groups * int(net.rng.integers(1, 5)))


def piece_residual(net: Net, y: ov.Node) -> ov.Node:
    z = _activate(net, net.conv(y, int(net.rng.integers(2, 9))))
    return op.add(net.conv(z, channels_of(y), bias=bool(net.rng.integers(2))), y)


def piece_dense(net: Net, y: ov.Node) -> ov.Node:
    return op.concat([y, _activate(net, net.conv(y, int(net.rng.integers(2, 6))))], 1)


def piece_branches(net: Net, y: ov.Node) -> ov.Node:
    return op.add(net.conv(op.relu(net.conv(y, 5)), 6, 1), _activate(net, net.conv(y, 6, 1)))


def piece_gate(net: Net, y: ov.Node) -> ov.Node:
    pooled = op.reduce_mean(y, net.ints(2, 3), True)
    gate = net.conv(op.relu(net.conv(pooled, 3, 1)), channels_of(y), 1)
    return op.multiply(y, op.sigmoid(gate))


def piece_shuffle(net: Net, y: ov.Node) -> ov.Node:
    half = int(net.rng.integers(2, 6))
    side = y.output(0).get_partial_shape()[2].get_length()
    y = net.conv(y, 2 * half, 1)
    y = op.transpose(op.reshape(y, net.ints(0, 2, half, side, side), True), net.ints(0, 2, 1, 3, 4))
    return op.reshape(y, net.ints(0, 2 * half, side, side), True)


def piece_split(net: Net, y: ov.Node) -> ov.Node:
    channels = channels_of(y)
    first = int(net.rng.integers(1, channels))
    parts = op.variadic_split(y, op.constant(np.int64(1)), net.ints(first, -1)).outputs()
    return op.concat([_activate(net, net.conv(parts[0], 4)), parts[1]], 1)


def piece_slices(net: Net, y: ov.Node) -> ov.Node:
    middle = channels_of(y) // 2
    low = op.slice(y, net.ints(0), net.ints(middle), net.ints(1), net.ints(1))
    high = op.slice(y, net.ints(middle), net.ints(2**62), net.ints(1), net.ints(-3))
    return op.concat([op.tanh(high), low, high], 1)


def piece_widen(net: Net, y: ov.Node) -> ov.Node:
    """A padded shortcut beside a convolution."""
    before, after = (int(v) for v in net.rng.integers(0, 4, 2))
    ends = [net.ints(0, before, 0, 0), net.ints(0, after, 0, 0)]
    return op.add(
        op.pad(y, *ends, "constant", op.constant(np.float32(0.5))),
        net.conv(y, channels_of(y) + before + after),
    )


def piece_pixels(net: Net, y: ov.Node) -> ov.Node:
    mode = str(net.rng.choice(["blocks_first", "depth_first"]))
    return op.depth_to_space(op.space_to_depth(net.conv(y, 4), mode, 2), mode, 2)


def piece_attention(net: Net, y: ov.Node) -> ov.Node:
    side = y.output(0).get_partial_shape()[2].get_length()
    y = net.conv(y, 8, 1)
    tokens = op.transpose(op.reshape(y, net.ints(0, 8, side * side), True), net.ints(0, 2, 1))
    tokens = op.add(attention(net, tokens, 2, net.count, fused=bool(net.rng.integers(2))), tokens)
    return op.reshape(op.transpose(tokens, net.ints(0, 2, 1)), net.ints(0, 8, side, side), True)


def piece_norm(net: Net, y: ov.Node) -> ov.Node:
    return op.prelu(op.mvn(y, net.ints(2, 3), True, 1e-3, "inside_sqrt"), net.const(channels_of(y)))


def piece_pool(net: Net, y: ov.Node) -> ov.Node:
    return op.add(op.avg_pool(y, [1, 1], [1, 1], [1, 1], [3, 3], True), y)


PIECES: Mapping[str, Piece] = {
    name.removeprefix("piece_"): value for name, value in list(globals().items()) if name.startswith("piece_")
}


def random_graph(pieces: Sequence[str], seed: int, *, flat: bool, batch: int) -> ov.Model:
    """The named pieces one after another, with a head that pools or flattens."""
    net = Net(seed)
    x = net.input(batch, 3, 4, 4)
    y = op.relu(net.conv(x, int(net.rng.integers(3, 9))))
    for name in pieces:
        y = PIECES[name](net, y)
    if flat:
        y = op.relu(net.dense(op.reshape(y, net.ints(0, -1), True), 6))
        return model([net.dense(y, 3)], [x])
    return model([net.head(y)], [x])


# --------------------------------------------------------------------------- plans and proof


def random_widths(
    groups: Sequence[PruningGroup], rng: np.random.Generator, *, vanish: float = 0.0, most: int = 1000
) -> list[GroupWidth]:
    """A width for most groups; with probability `vanish` a group that may go goes whole, `most` of them at most."""
    widths: list[GroupWidth] = []
    for group in groups:
        if rng.random() < 0.2:
            continue
        count = int(rng.integers(1, group.units + 1))
        if group.can_vanish and rng.random() < vanish and sum(not width.kept for width in widths) < most:
            count = 0
        kept = sorted(rng.permutation(group.units)[:count].tolist())
        widths.append(GroupWidth(group=group.name, kept=tuple(kept)))
    return widths


def random_sample(
    net: ov.Model, rng: np.random.Generator, *, batch: int = 2, length: int = 9
) -> dict[str, np.ndarray]:
    """One array per input; dynamic dimensions become `batch` (the first) and `length`."""
    sample = {}
    for number, port in enumerate(net.inputs):
        shape = [
            size.get_length() if size.is_static else (batch if axis == 0 else length)
            for axis, size in enumerate(port.get_partial_shape())
        ]
        dtype = port.get_element_type().to_dtype()
        real = port.get_element_type().is_real()
        values = rng.normal(size=shape) if real else rng.integers(0, 32, size=shape)
        sample[str(number)] = values.astype(dtype)
    return sample


def proven_difference(
    net: ov.Model, coupling: Coupling, widths: Sequence[GroupWidth], rng: np.random.Generator
) -> float:
    """Worst relative difference between the smaller model and the zeroed whole one."""
    pruned = apply_pruning(net, coupling, widths)
    reference = zeroed_reference(net, coupling, widths)
    return verify_pruning(pruned.model, reference, [random_sample(net, rng)])
