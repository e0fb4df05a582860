# SPDX-License-Identifier: Apache-2.0
"""MXFP4 as gpt-oss has it and transformers writes it: two tensors a weight, bit for bit.

  NAME_blocks  uint8 [..., n, k / 32, 16]: the codes of 32 columns, the first of two in the low nibble
  NAME_scales  uint8 [..., n, k / 32]: E8M0, 2^(byte - 127)

gpt-oss has one such pair for all experts of a layer, `experts.gate_up_proj` and `experts.down_proj` with a further
dimension first. `split_experts_` makes nn.Linear layers of the experts of transformers' model, which everything in
bitmill can take; `import_` fills them from a checkpoint. So gpt-oss runs from its 4 bits, on a CPU too:

    split_experts_(model)
    import_(model, folder)

Source: openai/gpt-oss (the checkpoints), transformers' integrations/mxfp4.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..convert import Filter, replace_modules
from ..ops._checks import require
from ._fp4_files import (
    Builder,
    FP4Weight,
    Source,
    bytes_of,
    fp4_layers,
    import_linears,
    packed_layers,
    read_tensors,
    reorder,
    rows_of,
    whole_blocks,
)

BLOCKS, SCALES, BIAS = "_blocks", "_scales", "_bias"
BLOCK_BYTES = 16
PROJECTIONS = ("gate_up_proj", "down_proj")


def from_blocks(blocks: Tensor, scales: Tensor, nibble_order: str = "low") -> tuple[Tensor, Tensor]:
    """A pair of tensors as `ops.mxfp4_quantize` has it, bit for bit.

    Args:
        blocks: uint8 (or float4_e2m1fn_x2) [..., groups, 16].
        scales: uint8 (or float8_e8m0fnu) [..., groups]; 255 is NaN, as everywhere.
        nibble_order: where the first of two codes is, "low" or "high".
    Returns:
        packed uint8 [..., 16 groups] and scale uint8 [..., groups], of 32 groups columns.
    Raises:
        ValueError: for other dtypes or shapes.
    """
    blocks = bytes_of("from_blocks", "blocks", blocks, "float4_e2m1fn_x2")
    scales = bytes_of("from_blocks", "scales", scales, "float8_e8m0fnu")
    require(
        blocks.dim() >= 2 and blocks.shape[-1] == BLOCK_BYTES,
        f"from_blocks: blocks must have shape [..., groups, 16], got {list(blocks.shape)}; k must be a multiple of 32",
    )
    require(
        scales.shape == blocks.shape[:-1],
        f"from_blocks: scales must have shape {list(blocks.shape[:-1])} for these blocks, got {list(scales.shape)};"
        " take both from one checkpoint",
    )
    return reorder("from_blocks", blocks.flatten(-2), nibble_order), scales


def to_blocks(packed: Tensor, scale: Tensor, nibble_order: str = "low") -> tuple[Tensor, Tensor]:
    """Undo `from_blocks`: blocks uint8 [..., groups, 16] and scales uint8 [..., groups].

    Raises:
        ValueError: for other dtypes or shapes, such as those of a k that is no multiple of 32.
    """
    blocks, scales = whole_blocks("to_blocks", packed, scale)
    return reorder("to_blocks", blocks, nibble_order), scales


def read(source: Source, nibble_order: str = "low") -> dict[str, FP4Weight]:
    """Every MXFP4 weight of a checkpoint by its NAME, in the layout of `from_blocks`.

    Args:
        source: tensors by name, or the path of a safetensors file or of a folder of them.
    Raises:
        ValueError: for a damaged file, a pair that is not complete, or as `from_blocks`, the name first.
    """
    tensors, weights = read_tensors(source), {}
    for key, blocks in tensors.items():
        if not key.endswith(BLOCKS):
            continue
        name = key.removesuffix(BLOCKS)
        scales = tensors.get(name + SCALES)
        if scales is None:
            raise ValueError(f"read: the file must hold {name}{SCALES} beside {key}; take the whole checkpoint")
        try:
            weights[name] = FP4Weight("mxfp4", *from_blocks(blocks, scales, nibble_order))
        except ValueError as error:
            raise ValueError(f"read: {name}: {error}") from None
    return weights


class SplitExperts(nn.Module):
    """The experts of a gpt-oss layer, each projection of each expert a linear layer.

    gate_up_proj gives gates and values in turns: y = down_proj((u + 1) g sigmoid(alpha g)), g = min(gate, limit),
    u = min(max(value, -limit), limit). Takes the place of transformers' GptOssExperts.
    """

    gate_up_proj: nn.ModuleList
    down_proj: nn.ModuleList

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.alpha, self.limit = experts.alpha, experts.limit
        for name in PROJECTIONS:
            weight, bias = getattr(experts, name), getattr(experts, f"{name}_bias")
            self.add_module(name, nn.ModuleList(map(_linear, weight.detach(), bias.detach())))
        self.train(experts.training)

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        """hidden_states [m, k]; router_indices and routing_weights [m, experts a token]."""
        out = torch.zeros_like(hidden_states)
        for expert in router_indices.unique().tolist():
            token, position = torch.where(router_indices == expert)
            gate_up = self.gate_up_proj[expert](hidden_states[token])
            gate = gate_up[..., 0::2].clamp(max=self.limit)
            value = gate_up[..., 1::2].clamp(-self.limit, self.limit)
            y = self.down_proj[expert]((value + 1) * (gate * torch.sigmoid(gate * self.alpha)))
            out.index_add_(0, token, (y * routing_weights[token, position, None]).to(out.dtype))
        return out


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """y = x W + b with W [k, n]."""
    k, n = weight.shape
    linear = nn.Linear(k, n, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight.T.contiguous()), nn.Parameter(bias.clone())
    return linear


def split_experts_(model: nn.Module) -> list[str]:
    """Swap the experts of transformers' gpt-oss for `SplitExperts`, in place; on the meta device too.

    Returns:
        The names that were swapped.
    Raises:
        ValueError: if the model has none.
        ImportError: if transformers is not installed, or knows no gpt-oss.
    """
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    replacements: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, GptOssExperts):
            replacements[module] = SplitExperts(module)
    require(bool(replacements), "split_experts_: the model must have transformers' GptOssExperts, got none")
    names = [name for name, module in model.named_modules() if module in replacements]
    replace_modules(model, replacements)
    return names


@torch.no_grad()
def import_(
    model: nn.Module,
    source: Source,
    activations: str = "float",
    filter_fn: Filter | None = None,
    nibble_order: str = "low",
) -> list[str]:
    """Put packed layers with a checkpoint's codes, scales and biases in the place of nn.Linear layers.

    NAME is the name of a module, with or without ".weight"; its bias is NAME_bias, or as nn.Linear has it. Where NAME
    is an nn.ModuleList (`split_experts_`), each of its layers takes its part of the tensors. All other tensors of the
    checkpoint are left to `model.load_state_dict(tensors, strict=False)`.

    Args:
        source: as for `read`.
        activations: "float" or "int8" (`FP4Config`).
        filter_fn: called with (module, name); a false answer leaves the layer alone.
    Returns:
        The names of the layers.
    Raises:
        ValueError: for a checkpoint that does not fit the model, the layer's name first. The model is unchanged then.
    """
    tensors = read_tensors(source)
    layers: dict[str, Builder] = {}
    for name, weight in read(tensors, nibble_order).items():
        module = name.removesuffix(".weight")
        bias = tensors.get(f"{name}{BIAS}", tensors.get(f"{module}.bias"))
        layers |= fp4_layers(module, weight, bias, activations)
    return import_linears(model, layers, filter_fn)


@torch.no_grad()
def export(model: nn.Module, nibble_order: str = "low") -> dict[str, Tensor]:
    """The model's state_dict with `NAME.weight_blocks` and `NAME.weight_scales` for every packed MXFP4 layer, and the
    experts of `SplitExperts` as gpt-oss has them: ready for `safetensors.torch.save_file` and for `import_`.

    Raises:
        ValueError: for a layer whose in_features is no multiple of 32, the name first.
    """
    state = dict(model.state_dict())
    packed = packed_layers(model, "mxfp4")
    for name, layer in packed.items():
        del state[f"{name}.weight"]
        try:
            blocks, scales = to_blocks(rows_of(layer), state.pop(f"{name}.scale"), nibble_order)
        except ValueError as error:
            raise ValueError(f"export: {name}: {error}") from None
        state[f"{name}.weight{BLOCKS}"], state[f"{name}.weight{SCALES}"] = blocks, scales
    for name, module in model.named_modules():
        if isinstance(module, SplitExperts):
            for projection in PROJECTIONS:
                experts = [f"{name}.{projection}.{expert}" for expert in range(len(getattr(module, projection)))]
                if packed.keys() >= set(experts):
                    for old, new in ((f"weight{BLOCKS}", BLOCKS), (f"weight{SCALES}", SCALES), ("bias", BIAS)):
                        parts = [state.pop(f"{expert}.{old}") for expert in experts]
                        state[f"{name}.{projection}{new}"] = torch.stack(parts)
    return state
