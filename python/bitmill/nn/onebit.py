# SPDX-License-Identifier: Apache-2.0
"""OneBitLinear: signs between two vectors, and a LayerNorm: y = LN(((x * g) sgn(W)^T) * h) + bias.

g [in_features] and h [out_features] carry the magnitudes of the weight, which begin as its rank-one approximation
|W| ~ h g^T (sign-value-independent decomposition). The LayerNorm runs over the outputs of a row, without parameters,
and cannot be folded into the weight. Training form and packed form agree bit for bit.

Source: Xu et al., OneBit: Towards Extremely Low-bit Large Language Models, NeurIPS 2024 (arXiv 2402.11295), sections
3.1 to 3.3; the gradient of sgn(W) as its published code has it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..binarize import BinarizedWeight, exact_linear, sign, weight_linear
from ..config import OneBitConfig
from ..ops import int8_fake_quant, int8_quantize, tile_pack
from ..ops._checks import tile_shape
from ..ops._library import without_autocast
from ..ops.binary_matmul import unpack_signs
from ._module import LatentLinear, PackedModule, as_float32, linear_from, require_finite, require_width
from .packed_binary import check_padding

LAYER_NORM_EPS = 1e-5
ITERATIONS = 30  # of the power method; matrices of magnitudes need about 5

_binary_weight_linear = torch.ops.bitmill.binary_weight_linear.default


def rank_one(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """h [n] and g [k], of equal norm, with h g^T nearest to a matrix [n, k] of numbers >= 0 in the Frobenius norm.

    The leading singular vectors of such a matrix have no negative entry (Perron and Frobenius), so this is its best
    non-negative factorisation too. Alternating least squares: each half step solves for one vector exactly.
    """
    if magnitude.is_meta:  # a layer that is about to be loaded
        return magnitude.new_empty(magnitude.shape[0]), magnitude.new_empty(magnitude.shape[1])
    tiny = torch.finfo(torch.float32).tiny
    size = magnitude.amax().clamp_min(tiny) if magnitude.numel() else magnitude.new_ones(())
    a = magnitude / size
    h, g = a.new_zeros(a.shape[0]), a.new_ones(a.shape[1])
    for _ in range(ITERATIONS):
        h = a @ g / g.square().sum().clamp_min(tiny)
        g = h @ a / h.square().sum().clamp_min(tiny)
    balance = (g.norm() / h.norm().clamp_min(tiny)).sqrt()
    root = size.sqrt()
    return h * balance * root, g / balance.clamp_min(tiny) * root


def normalised(z: Tensor, bias: Tensor | None) -> Tensor:
    """LayerNorm over the last dimension, without parameters, and then the bias."""
    y = nn.functional.layer_norm(z, z.shape[-1:], eps=LAYER_NORM_EPS) if z.shape[-1] else z
    return y if bias is None else y + bias


class OneBitLinear(LatentLinear):
    """Training form: latent weight [out_features, in_features], of which the sign counts.

    Parameters besides weight and bias: in_scale (g) [in_features] and out_scale (h) [out_features], which start from
    the weight that the layer is created with. The gradient of sgn(W) is that of the output times 1.001 - tanh(W)^2.
    The published training starts from latent weights of 0.01 sgn(W), which flip sooner. Output dtype = input dtype; the
    arithmetic is float32, also under autocast.
    """

    config_class: ClassVar = OneBitConfig
    config: OneBitConfig
    in_scale: Tensor
    out_scale: Tensor

    def create_state(self, device: torch.device, dtype: torch.dtype) -> None:
        out_scale, in_scale = rank_one(self.weight.detach().float().abs())
        self.in_scale = nn.Parameter(in_scale.to(device=device, dtype=dtype))
        self.out_scale = nn.Parameter(out_scale.to(device=device, dtype=dtype))

    def signs(self) -> Tensor:
        """sgn(W) as float32 [out_features, in_features], with its straight-through gradient."""
        return sign(self.weight.float(), "tanh", self.config.zero)

    def forward(self, x: Tensor) -> Tensor:
        require_width("OneBitLinear", x, self.in_features)
        with without_autocast(x):
            scaled, signs, scale = x.float() * self.in_scale.float(), self.signs(), self.out_scale.float().unsqueeze(1)
            weight = BinarizedWeight(scale * signs, signs.detach(), scale)
            if self.config.activations == "int8":
                levels, step = int8_quantize(scaled.detach())
                rows = int8_fake_quant(scaled)
                z = exact_linear(rows, weight, None, rows=step.unsqueeze(-1), level=levels)
            else:
                z = weight_linear(scaled, weight, None)
            return normalised(z, as_float32(self.bias)).to(x.dtype)

    @torch.no_grad()
    def pack(self) -> PackedOneBitLinear:
        """The packed form, from the expressions that trained.

        Raises:
            ValueError: for a weight or a scale with NaN or infinity.
        """
        for tensor in (self.weight, self.in_scale, self.out_scale):
            require_finite("OneBitLinear", tensor)
        signs = self.signs()
        zeros = bool((signs == 0).any())
        packed = PackedOneBitLinear(
            self.in_features, self.out_features, self.bias is not None, self.config, zeros, device="meta"
        )
        packed.weight = tile_pack((signs > 0).to(torch.uint8), 1)
        packed.weight_nonzero = tile_pack((signs != 0).to(torch.uint8), 1) if zeros else None
        packed.in_scale = self.in_scale.detach().float().clone()
        packed.out_scale = self.out_scale.detach().float().unsqueeze(1).clone()
        packed.bias = None if self.bias is None else self.bias.detach().float().clone()
        return packed.train(self.training)

    @torch.no_grad()
    def dequantize(self) -> nn.Sequential:
        """An nn.Linear with the weight h sgn(W) g, and the LayerNorm with the bias."""
        dense = self.out_scale.float().unsqueeze(1) * self.signs() * self.in_scale.float()
        return with_layer_norm(dense, self.bias, self.weight.dtype, self.training)


class PackedOneBitLinear(PackedModule):
    """Packed form: 1-bit weights in tiles between float32 vectors; activations stay floats or become int8.

    Buffers: weight int32 [ceil(n/16), ceil(k/32), 16]; weight_nonzero the same, where signs are 0; in_scale float32
    [k]; out_scale float32 [n, 1]; bias float32 [n]. The product is one op; the input scale and the LayerNorm are
    torch's own.
    """

    config: OneBitConfig
    kernel = "binary_weight_linear"
    weight: Tensor
    weight_nonzero: Tensor | None
    in_scale: Tensor
    out_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: OneBitConfig | None = None,
        weight_zeros: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config if config is not None else OneBitConfig()
        self.in_features, self.out_features, self.weight_zeros = in_features, out_features, weight_zeros

        def words() -> Tensor:
            return torch.zeros(tile_shape(out_features, in_features), dtype=torch.int32, device=device)

        self.register_buffers(
            weight=words(),
            weight_nonzero=words() if weight_zeros else None,
            in_scale=torch.zeros(in_features, device=device),
            out_scale=torch.zeros(out_features, 1, device=device),
            bias=torch.zeros(out_features, device=device) if bias else None,
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: OneBitConfig | None = None) -> PackedOneBitLinear:
        """Decompose and pack an nn.Linear."""
        return OneBitLinear.from_linear(linear, config).pack()

    def arguments(self) -> dict[str, int | bool]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "weight_zeros": self.weight_zeros,
        }

    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        require_width("PackedOneBitLinear", x, self.in_features)
        scaled = x.float() * self.in_scale
        z = _binary_weight_linear(
            scaled, self.weight, self.out_scale, None, self.weight_nonzero, 0, self.config.activations
        )
        return normalised(z, self.bias).to(x.dtype)

    @torch.no_grad()
    def dequantize(self) -> nn.Sequential:
        """An nn.Linear (float32) with the weight h sgn(W) g, and the LayerNorm with the bias."""
        signs = unpack_signs(self.weight, self.weight_nonzero, self.out_features, self.in_features)
        return with_layer_norm(self.out_scale * signs * self.in_scale, self.bias, torch.float32, self.training)

    def validate(self) -> None:
        for name in ("weight", "weight_nonzero"):
            check_padding(name, getattr(self, name), self.out_features, self.in_features)
        for name in ("in_scale", "out_scale"):
            if not torch.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name}: every scale must be finite, got NaN or infinity; the layer is corrupt")


def with_layer_norm(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, training: bool) -> nn.Sequential:
    """An nn.Linear without bias and the LayerNorm that follows it, whose own bias the layer's becomes."""
    norm = nn.LayerNorm(weight.shape[0], LAYER_NORM_EPS, bias is not None, device=weight.device, dtype=dtype)
    if bias is not None:
        norm.bias = nn.Parameter(bias.detach().to(dtype).clone())
    return nn.Sequential(linear_from(weight, None, dtype, training), norm).train(training)
