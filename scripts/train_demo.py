"""Train the networks that ship with the package and its tests on real handwritten digits.

Data: scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" test set (E. Alpaydin,
C. Kaynak; CC BY 4.0), 1797 images of 8x8, enlarged to 32x32 uint8. A stratified half trains the network,
the other half is held out.

    python scripts/train_demo.py                                   # writes vinoopt/demo/
    python scripts/train_demo.py --wide tests/data/digits_wide.onnx    # twice the width, float16 constants

Needs torch, scikit-learn and onnx; nothing of the package imports this file.
"""

from __future__ import annotations

import argparse
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
SIDE = 32
WIDTHS = (32, 32, 48)
BLOCKS_PER_STAGE = 2
SEED = 20
MEAN, SCALE = 79.5, 91.0  # of the training half's pixels, rounded
PREPROCESS = f"""\
# How the images in digits.npz become the network's input; embedded into the deployed model.
input = "images"
image_layout = "NHWC"
model_layout = "NCHW"
mean = [{MEAN}]
scale = [{SCALE}]
"""


@dataclass(frozen=True)
class Digits:
    """uint8 images [N,32,32,1] and labels of the two halves."""

    train_images: np.ndarray
    train_labels: np.ndarray
    held_out_images: np.ndarray
    held_out_labels: np.ndarray


def load() -> Digits:
    raw = load_digits()
    small = torch.from_numpy(raw.images).float()[:, None] * (255 / 16)
    large = functional.interpolate(small, (SIDE, SIDE), mode="bicubic", align_corners=False)
    images = large.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()
    train, held_out = train_test_split(
        np.arange(len(images)), test_size=0.5, random_state=SEED, stratify=raw.target
    )
    labels = raw.target.astype(np.int64)
    return Digits(images[train], labels[train], images[held_out], labels[held_out])


def to_input(images: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() - MEAN) / SCALE


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.has_projection = stride != 1 or inputs != outputs
        if self.has_projection:
            self.projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.norm3 = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features [N,outputs,H/stride,W/stride]."""
        y = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(y + (self.norm3(self.projection(x)) if self.has_projection else x))


class ResidualNet(nn.Module):
    """Stem, three stages of residual blocks, global average, linear classifier."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        stem = {"conv": nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), "norm": nn.BatchNorm2d(widths[0])}
        self.stem = nn.Sequential(OrderedDict(stem, relu=nn.ReLU()))
        blocks: list[nn.Module] = []
        for stage, (inputs, outputs) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            for index in range(BLOCKS_PER_STAGE):
                stride = 2 if stage and not index else 1
                blocks.append(Block(outputs if index else inputs, outputs, stride))
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(widths[-1], 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [N,10]."""
        return self.classifier(self.blocks(self.stem(images)).mean((2, 3)))


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The batch, each image turned, scaled, shifted and dimmed a little."""
    n = len(x)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    angle, size = uniform(-0.2, 0.2), uniform(0.88, 1.12)
    cos, sin = angle.cos() * size, angle.sin() * size
    matrix = torch.stack([cos, -sin, uniform(-0.1, 0.1), sin, cos, uniform(-0.1, 0.1)], 1).view(n, 2, 3)
    grid = functional.affine_grid(matrix, list(x.shape), align_corners=False)
    blank = -MEAN / SCALE
    moved = functional.grid_sample(x - blank, grid, align_corners=False) + blank
    return moved * uniform(0.85, 1.1).view(n, 1, 1, 1)


def train(data: Digits, widths: tuple[int, ...], epochs: int) -> ResidualNet:
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    net = ResidualNet(widths)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
    batch_size = 64
    steps = epochs * math.ceil(len(data.train_images) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    inputs, labels = to_input(data.train_images), torch.from_numpy(data.train_labels)
    for epoch in range(epochs):
        net.train()
        for batch in torch.randperm(len(inputs), generator=generator).split(batch_size):
            logits = net(augment(inputs[batch], generator))
            loss = functional.cross_entropy(logits, labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)
    return net.eval()


def accuracy(net: ResidualNet, images: np.ndarray, labels: np.ndarray) -> float:
    with torch.inference_mode():
        return float((net(to_input(images)).argmax(1).numpy() == labels).mean())


def export(net: ResidualNet, path: Path, *, half: bool) -> None:
    """Write opset 17 with a dynamic batch; `half` stores the weights as float16 behind a Cast."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        net,
        (torch.zeros(1, 1, SIDE, SIDE),),
        str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": {0: "N"}, "logits": {0: "N"}},
        opset_version=17,
        dynamo=False,
    )
    model = onnx.load(path)
    rename(model.graph)
    if half:
        halve_weights(model.graph)
    model.producer_name, model.producer_version = "train_demo", ""
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def rename(graph: onnx.GraphProto) -> None:
    """Give nodes and tensors plain names: `blocks.0.conv1`, `blocks.0.conv1.weight`."""
    names = {value.name: value.name for value in (*graph.input, *graph.output)}
    for node in graph.node:
        # The exporter writes "/blocks/blocks.0/conv1/Conv": containers, module, operator.
        *path, operator = node.name.strip("/").split("/")
        inner = [*path[1:], ""]
        path = [part for part, after in zip(path, inner, strict=False) if not after.startswith(f"{part}.")]
        is_module = operator in {"Conv", "Relu", "Gemm"}
        node.name = ".".join(path if is_module else [*path, operator.lower()])
        for suffix, name in zip(("weight", "bias"), node.input[1:], strict=False):
            names.setdefault(name, f"{node.name}.{suffix}")
        names.setdefault(node.output[0], node.name)
    for node in graph.node:
        node.input[:] = [names[name] for name in node.input]
        node.output[:] = [names[name] for name in node.output]
    for tensor in graph.initializer:
        tensor.name = names[tensor.name]
    del graph.value_info[:]


def halve_weights(graph: onnx.GraphProto) -> None:
    casts = []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim > 1:
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.f16"))
            to = onnx.TensorProto.FLOAT
            casts.append(helper.make_node("Cast", [f"{name}.f16"], [name], f"{name}.cast", to=to))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wide", type=Path, help="write the net of twice the width here")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)

    data = load()
    widths = tuple(2 * width for width in WIDTHS) if options.wide else WIDTHS
    net = train(data, widths, options.epochs)
    print(f"{sum(p.numel() for p in net.parameters())} parameters")
    print(f"training half {accuracy(net, data.train_images, data.train_labels):.4f}")
    print(f"held-out half {accuracy(net, data.held_out_images, data.held_out_labels):.4f}")
    if options.wide:
        export(net, options.wide, half=True)
        return
    demo = ROOT / "vinoopt" / "demo"
    export(net, demo / "digits.onnx", half=False)
    np.savez_compressed(demo / "digits.npz", images=data.held_out_images, labels=data.held_out_labels)
    (demo / "preprocess.toml").write_text(PREPROCESS, encoding="utf-8")


if __name__ == "__main__":
    main()
