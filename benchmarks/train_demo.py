"""Train the demo model: a residual CNN with dense and depthwise convolutions on Fashion-MNIST (MIT licence).

Run once by the maintainers; the results are embedded in the package and `make demo` needs none of this:

    python -m benchmarks.train_demo --data FOLDER_WITH_IDX_GZ_FILES --out hwopt/demo

writes `fashion.onnx` (float32, batch-normalization folded by the exporter only where it is exact) and `fashion.npz` with
`calibrate` images from the training half and `evaluate` images with `labels` from the test half, all uint8.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from benchmarks.fashion import dataset

CALIBRATION_IMAGES, EVALUATION_IMAGES = 512, 4000


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layers = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    return nn.Sequential(*layers)


class Dense(nn.Module):
    """Two 3 x 3 convolutions around a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = conv(channels, channels), conv(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class Inverted(nn.Module):
    """Expand 1 x 1, depthwise 3 x 3, project 1 x 1 around a residual connection (MobileNetV2, Sandler et al. 2018)."""

    def __init__(self, channels: int, factor: int = 3) -> None:
        super().__init__()
        wide = channels * factor
        self.expand, self.depthwise, self.project = (
            conv(channels, wide, 1),
            conv(wide, wide, groups=wide),
            conv(wide, channels, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.project(torch.relu(self.depthwise(torch.relu(self.expand(x)))))


class FashionNet(nn.Module):
    """uint8-scaled images [n, 1, 28, 28] in 0..1 -> 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv(1, 32), conv(32, 64, stride=2)
        self.dense = nn.Sequential(Dense(64), Dense(64))
        self.shrink, self.widen = conv(64, 64, stride=2, groups=64), conv(64, 128, 1)
        self.inverted = nn.Sequential(Inverted(128), Inverted(128))
        self.last, self.head = conv(128, 128), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.down(torch.relu(self.stem(x))))
        x = self.inverted(torch.relu(self.widen(torch.relu(self.shrink(self.dense(x))))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


def augmented(images: torch.Tensor) -> torch.Tensor:
    """Random horizontal flips and shifts by up to two pixels."""
    flip = torch.rand(len(images)) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded, (down, right) = nn.functional.pad(images, (2, 2, 2, 2)), torch.randint(0, 5, (2,)).tolist()
    return padded[:, :, down : down + 28, right : right + 28]


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        hits = [(model(x).argmax(1) == y).sum().item() for x, y in zip(images.split(500), labels.split(500), strict=True)]
    return sum(hits) / len(labels)


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, batch: int = 128) -> None:
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.15, total_steps=steps)
    for epoch in range(epochs):
        model.train()
        started = time.perf_counter()
        for rows in torch.randperm(len(images))[: len(images) // batch * batch].split(batch):
            loss = nn.functional.cross_entropy(model(augmented(images[rows])), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(
            f"epoch {epoch + 1}/{epochs}: last loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s",
            flush=True,
        )


def export(model: nn.Module, path: Path) -> None:
    """ONNX with a free batch; every layer's node is called as the module it comes from."""
    model.eval()
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (torch.zeros(2, 1, 28, 28),), dynamic_shapes=batch)
    names = {"input_names": ["image"], "output_names": ["logits"]}
    exported = torch.onnx.export(program, (), dynamo=True, verbose=False, **names).model_proto
    for node in exported.graph.node:
        owner = next((name for name in node.input if name.endswith("weight")), "")
        node.name = owner.removesuffix(".weight").removesuffix(".0") or node.name.removeprefix("node_")
    for part in (*exported.graph.node, *exported.graph.value_info):  # the exporter writes stack traces with the paths of files
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.save(exported, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--weights", type=Path, help="a state dict to export instead of training")
    options = parser.parse_args()
    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    (train_x, train_y), (test_x, test_y) = dataset(options.data, "train"), dataset(options.data, "t10k")
    model = FashionNet().to(memory_format=torch.channels_last)
    as_input = lambda x: torch.from_numpy(x[:, None].astype(np.float32) / 255)  # noqa: E731
    if options.weights:
        model.load_state_dict(torch.load(options.weights))
    else:
        train(model, as_input(train_x), torch.from_numpy(train_y.astype(np.int64)), options.epochs)
    score = accuracy(model, as_input(test_x), torch.from_numpy(test_y.astype(np.int64)))
    print(f"top-1 on all 10,000 test images: {score:.4f}")
    export(model, options.out / "fashion.onnx")
    np.savez_compressed(
        options.out / "fashion.npz",
        calibrate=train_x[:CALIBRATION_IMAGES, None],
        evaluate=test_x[:EVALUATION_IMAGES, None],
        labels=test_y[:EVALUATION_IMAGES].astype(np.int64),
    )


if __name__ == "__main__":
    main()
