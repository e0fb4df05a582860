# SPDX-License-Identifier: Apache-2.0
"""Image files, and the order of what a model answers for them."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from pathlib import Path

import pytest
import torch
from torch import nn

from bitmill.recipes.images import Images, load_images, logits_of


def test_idx_files(idx_folder: Path) -> None:
    train, test = load_images(idx_folder)
    assert train.pixels.shape == (40, 1, 8, 8) and len(test) == 12
    assert test.labels.tolist() == [0, 1, 2, 3] * 3
    values = train.pixels.double()
    torch.testing.assert_close(train.mean, values.mean().float().reshape(1))
    torch.testing.assert_close(train.std, values.std(correction=0).float().reshape(1))
    pixels, labels = train.batch([3, 5])
    torch.testing.assert_close(pixels * train.std + train.mean, train.pixels[[3, 5]].float(), atol=1e-3, rtol=0)
    assert labels.tolist() == [3, 1]


def test_augmented_images_are_shifts_and_flips() -> None:
    pixels = torch.arange(1, 31, dtype=torch.uint8).view(1, 1, 5, 6).repeat(60, 2, 1, 1)
    images = Images(pixels, torch.zeros(60, dtype=torch.long), torch.zeros(2), torch.ones(2))
    batch, _ = images.batch(range(60), augment=True)
    padded = nn.functional.pad(pixels[0].float(), (2, 2, 2, 2))
    crops = [padded[:, i : i + 5, j : j + 6] for i in range(5) for j in range(5)]
    allowed = crops + [crop.flip(-1) for crop in crops]
    found = [next((i for i, a in enumerate(allowed) if torch.equal(a, image)), -1) for image in batch]
    assert min(found) >= 0 and len(set(found)) > 10
    torch.manual_seed(0)
    first, _ = images.batch(range(60), augment=True)
    torch.manual_seed(0)
    assert torch.equal(images.batch(range(60), augment=True)[0], first)


def test_tar_of_pictures(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install pillow")
    colours = {"cat": (10, 20, 30), "ship": (200, 100, 0), "airplane": (0, 0, 255)}
    for split in ("train", "test"):
        with tarfile.open(tmp_path / f"cifar10-png-{split}.tar.xz", "w:xz") as archive:
            for name, colour in colours.items():
                data = io.BytesIO()
                image.new("RGB", (4, 4), colour).save(data, "PNG")
                member = tarfile.TarInfo(f"{split}/{name}/0001.png")
                member.size = data.tell()
                data.seek(0)
                archive.addfile(member, data)
    train, _ = load_images(tmp_path)
    assert train.labels.tolist() == [3, 8, 0]
    assert train.pixels[:, :, 1, 2].tolist() == [list(colour) for colour in colours.values()]
    torch.testing.assert_close(train.mean, torch.tensor([70.0, 40.0, 95.0]))


def test_bad_image_files(idx_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected train-images-idx3-ubyte.gz or cifar10-\*train.tar"):
        load_images(tmp_path)
    labels = idx_folder / "train-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()
    for data, message in (
        (whole[:-12], "gzip-ed IDX file, got one that does not decompress"),
        (b"no gzip", "does not decompress"),
        (whole[:12] + bytes(b ^ 255 for b in whole[12:]), "does not decompress"),
        (gzip.compress(gzip.decompress(whole)[:-1]), r"expected \[40\] bytes of data, got 39"),
        (gzip.compress(b"\0\0\x08\x03"), "expected an IDX file with magic 0x801"),
        (gzip.compress(struct.pack(">2i", 0x801, 39) + bytes(39)), "as many train images as labels, got 40 and 39"),
    ):
        labels.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            load_images(idx_folder)


def test_logits_come_in_order(idx_folder: Path) -> None:
    _, test = load_images(idx_folder)
    got = logits_of(lambda x: x.flatten(1)[:, :4], test, batch_size=5)
    assert torch.equal(got, test.batch(range(12))[0].flatten(1)[:, :4])
