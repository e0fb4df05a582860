# SPDX-License-Identifier: Apache-2.0
"""Chains in models of transformers whose layers are those of BERT or ViT under other names.

Imported when `pack_` meets one of these classes. Compared with transformers 5.24, where their code differs from BERT's
and ViT's in names alone.
"""

from __future__ import annotations

from transformers.models.deit.modeling_deit import DeiTAttention, DeiTLayer, DeiTMLP
from transformers.models.electra.modeling_electra import (
    ElectraAttention,
    ElectraEmbeddings,
    ElectraEncoder,
    ElectraLayer,
    ElectraSelfAttention,
)
from transformers.models.roberta.modeling_roberta import (
    RobertaAttention,
    RobertaEncoder,
    RobertaLayer,
    RobertaSelfAttention,
)
from transformers.models.xlm_roberta.modeling_xlm_roberta import (
    XLMRobertaAttention,
    XLMRobertaEncoder,
    XLMRobertaLayer,
    XLMRobertaSelfAttention,
)

from ..chained import register_chain
from ._transformers_chain_bert import BertAttentionMixin, BertEmbeddingsMixin, BertEncoderMixin, BertLayerMixin
from ._transformers_chain_vit import ViTAttentionMixin, ViTLayerMixin, ViTMLPMixin


@register_chain
class ChainedDeiTAttention(ViTAttentionMixin, DeiTAttention):
    plain = DeiTAttention


@register_chain
class ChainedDeiTMLP(ViTMLPMixin, DeiTMLP):
    plain = DeiTMLP


@register_chain
class ChainedDeiTLayer(ViTLayerMixin, DeiTLayer):
    plain = DeiTLayer


@register_chain
class ChainedElectraEmbeddings(BertEmbeddingsMixin, ElectraEmbeddings):
    plain = ElectraEmbeddings


@register_chain
class ChainedElectraAttention(BertAttentionMixin, ElectraAttention):
    plain, self_attention = ElectraAttention, ElectraSelfAttention


@register_chain
class ChainedElectraLayer(BertLayerMixin, ElectraLayer):
    plain = ElectraLayer


@register_chain
class ChainedElectraEncoder(BertEncoderMixin, ElectraEncoder):
    plain = ElectraEncoder


@register_chain
class ChainedRobertaAttention(BertAttentionMixin, RobertaAttention):
    plain, self_attention = RobertaAttention, RobertaSelfAttention


@register_chain
class ChainedRobertaLayer(BertLayerMixin, RobertaLayer):
    plain = RobertaLayer


@register_chain
class ChainedRobertaEncoder(BertEncoderMixin, RobertaEncoder):
    plain = RobertaEncoder


@register_chain
class ChainedXLMRobertaAttention(BertAttentionMixin, XLMRobertaAttention):
    plain, self_attention = XLMRobertaAttention, XLMRobertaSelfAttention


@register_chain
class ChainedXLMRobertaLayer(BertLayerMixin, XLMRobertaLayer):
    plain = XLMRobertaLayer


@register_chain
class ChainedXLMRobertaEncoder(BertEncoderMixin, XLMRobertaEncoder):
    plain = XLMRobertaEncoder
