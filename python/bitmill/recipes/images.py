# SPDX-License-Identifier: Apache-2.0
"""Image sets from files on disk, for the image recipes: Fashion-MNIST and MNIST (IDX), CIFAR-10 (JPEG or PNG in a tar).

Images stay uint8 in memory; a batch is cropped, flipped and normalised when it is taken.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_IDX_IMAGES, _IDX_LABELS = 0x803, 0x801


@dataclasses.dataclass(frozen=True)
class Images:
    """One split: pixels uint8 [n, channels, height, width], labels int64 [n]; mean and std [channels] in 0...255."""

    pixels: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Sequence[int] | Tensor, augment: bool = False) -> tuple[Tensor, Tensor]:
        """Normalised float32 images [b, c, h, w] and labels [b]; `augment`: shifted by up to 2 pixels and flipped, by
        torch's random numbers."""
        index = torch.as_tensor(index)
        pixels = _augmented(self.pixels[index]) if augment else self.pixels[index]
        mean, std = (t.view(-1, 1, 1) for t in (self.mean, self.std))
        return (pixels.float() - mean) / std, self.labels[index]


def _augmented(pixels: Tensor, shift: int = 2) -> Tensor:
    b, _, height, width = pixels.shape
    padded = torch.nn.functional.pad(pixels, (shift,) * 4)
    offset = torch.randint(2 * shift + 1, (2, b, 1))
    rows, columns = torch.arange(height) + offset[0], torch.arange(width) + offset[1]
    flip = torch.rand(b, 1) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    return padded[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def logits_of(predict: Callable[[Tensor], Tensor], images: Images, batch_size: int = 500) -> Tensor:
    """predict's logits [n, classes] of all images, in order."""
    parts = torch.arange(len(images)).split(batch_size)
    return torch.cat([predict(images.batch(part)[0]).float().cpu() for part in parts])


def accuracy(logits: Tensor, images: Images) -> float:
    """Percent of the images whose largest logit is their label."""
    return 100 * (logits.argmax(-1) == images.labels).double().mean().item()


def load_images(folder: str | Path) -> tuple[Images, Images]:
    """Train and test split of the set that `folder` holds, normalised by the mean and deviation of the train split.

    Files: `{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz`, or `cifar10-*train.tar.*` and `cifar10-*test.tar.*` with
    members `<split>/<class>/<name>`, which need Pillow.

    Raises:
        FileNotFoundError: if the folder holds neither.
        ValueError: for a damaged file.
    """
    folder = Path(folder)
    if (folder / "train-images-idx3-ubyte.gz").exists():
        train, test = (_idx_split(folder, split) for split in ("train", "t10k"))
    else:
        train, test = (_tar_split(folder, split) for split in ("train", "test"))
    mean, std = _statistics(train[0])
    return Images(*train, mean, std), Images(*test, mean, std)


def _statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean and deviation of every channel, from the counts of the 256 levels."""
    levels = torch.arange(256, dtype=torch.float64)
    counts = [torch.bincount(channel.flatten(), minlength=256).double() for channel in pixels.unbind(1)]
    share = torch.stack(counts) / (pixels.numel() / pixels.shape[1])
    mean = share @ levels
    std = ((share * (levels - mean[:, None]) ** 2).sum(1)).sqrt()
    return mean.float(), std.float()


def _idx_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    images = _idx(folder / f"{split}-images-idx3-ubyte.gz", _IDX_IMAGES)
    labels = _idx(folder / f"{split}-labels-idx1-ubyte.gz", _IDX_LABELS)
    if len(images) != len(labels):
        raise ValueError(f"{folder}: expected as many {split} images as labels, got {len(images)} and {len(labels)}")
    return images.unsqueeze(1), labels.long()


def _idx(path: Path, magic: int) -> Tensor:
    """An IDX file: big-endian int32 magic (its low byte is the rank) and sizes, then uint8."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path}: expected a gzip-ed IDX file, got one that does not decompress ({error})") from None
    rank = magic & 0xFF
    header = np.frombuffer(data[: 4 * (rank + 1)], ">i4")
    if len(header) != rank + 1 or header[0] != magic:
        raise ValueError(f"{path}: expected an IDX file with magic {magic:#x}, got {data[:4].hex() or 'no data'}")
    shape = [int(size) for size in header[1:]]
    values = np.frombuffer(data, np.uint8, offset=4 * (rank + 1))
    if values.size != np.prod(shape):
        raise ValueError(f"{path}: expected {shape} bytes of data, got {values.size}; the file is damaged")
    return torch.from_numpy(values.reshape(shape).copy())


def _tar_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError(
            "load_images: reading JPEG or PNG needs Pillow, which is missing: pip install pillow"
        ) from None
    paths = sorted(folder.glob(f"cifar10-*{split}.tar*"))
    if not paths:
        raise FileNotFoundError(
            f"{folder}: expected train-images-idx3-ubyte.gz or cifar10-*{split}.tar.*, found neither"
        )
    pixels, labels = [], []
    with tarfile.open(paths[0]) as archive:
        for member in archive:
            if member.isfile():
                label = CIFAR10.index(Path(member.name).parent.name)
                file = archive.extractfile(member)
                assert file is not None
                image = Image.open(io.BytesIO(file.read())).convert("RGB")
                pixels.append(np.asarray(image).transpose(2, 0, 1))
                labels.append(label)
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels)
