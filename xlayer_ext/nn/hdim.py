"""Messages from one layer's tokens to another's: token-pair (HDIM) and attention (QKV).

HDIM:  Z = P_t·target,  Y = P_s·source,  logit_ij = w2 · act(W1·[z_i; y_j; z_i∘y_j; |z_i − y_j|] + b1)
       ctx = softmax_j(logit / τ) · source,   message = W_out · act(W_in·[ctx; target; …])
QKV:   message = softmax(q·kᵀ / √d) · v, per head
"""

from __future__ import annotations

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlayer_ext import functional as XF
from xlayer_ext.functional._checks import (
    check_choice,
    check_finite,
    check_floats,
    check_mask,
    check_positive,
    check_shapes,
    check_sizes,
)
from xlayer_ext.functional.hdim import ACTIVATIONS, FUSIONS
from xlayer_ext.nn._reset import reset
from xlayer_ext.types import Activation, Fusion, Scorer

SCORERS = get_args(Scorer)


class HDIMMessage(nn.Module):
    r"""Message from a source layer's tokens to a target layer's, scored pair by pair.

    .. math::
        Z = P_t H_t, \quad Y = P_s H_s, \quad
        \ell_{ij} = w_2 \cdot \mathrm{act}\big(W_1 [z_i; y_j; z_i \circ y_j; |z_i - y_j|] + b_1\big) + b_2 \\
        c = \mathrm{softmax}_j(\ell / \tau)\, H_s, \quad
        m = W_o\, \mathrm{act}_v(W_v [c; h; \ldots] + b_v) + b_o \;(+\, \beta (c - h))

    with ``h`` the target token, a value MLP of width ``E = 2·max(128, hidden_size // 2)``, and the message times α
    where ``alpha_init`` is given. Dropout acts on the message. A target token without an allowed source has ``c = 0``.

    Args:
        hidden_size: H, width of both layers.
        proj_dim: D, width of the projections.
        mlp_dim: M, hidden width of the pair MLP (scorer ``"4term"`` only).
        scorer: ``"4term"`` (the formula), ``"bilinear"`` (:math:`z W_b y^\top`), ``"cosine"`` (:math:`10 \cos(z, y)`).
        activation: of the pair MLP, ``"relu"`` or ``"gelu"``.
        fusion: blocks the value MLP reads: ``"concat_hadam"`` [c; h; c∘h], ``"concat_only"`` [c; h] or
            ``"concat_diff_hadam"`` [c; h; \|c − h\|; c∘h].
        value_activation: of the value MLP, ``"relu"`` or ``"gelu"``.
        share_projections: one projection for target and source.
        norm_projections: LayerNorm(D) on the projections.
        temperature: τ.
        value_residual: add β(c − h), β learned from ``residual_beta``.
        residual_beta: initial β.
        dropout: probability, on the message.
        alpha_init: initial value of an own scalar α that multiplies the message; ``None`` = no such scalar.
        device, dtype: of the parameters.

    Shape:
        - target ``[B, St, H]``, source ``[B, Ss, H]``, key_mask bool ``[B, Ss]``, attn_mask bool ``[B, St, Ss]``
          (True = may be used)
        - message ``[B, St, H]``; with ``return_entropy`` also the mean entropy of the rows in nats, a scalar

    Example::

        >>> message = HDIMMessage(256)
        >>> message(torch.randn(2, 10, 256), torch.randn(2, 12, 256)).shape
        torch.Size([2, 10, 256])
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        proj_dim: int = 24,
        mlp_dim: int = 96,
        scorer: Scorer = "4term",
        activation: Activation = "relu",
        fusion: Fusion = "concat_hadam",
        value_activation: Activation = "relu",
        share_projections: bool = False,
        norm_projections: bool = False,
        temperature: float = 1.0,
        value_residual: bool = False,
        residual_beta: float = 0.1,
        dropout: float = 0.0,
        alpha_init: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("scorer", scorer, SCORERS)
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("value_activation", value_activation, ACTIVATIONS)
        check_choice("fusion", fusion, tuple(FUSIONS))
        check_sizes(hidden_size=hidden_size, proj_dim=proj_dim, mlp_dim=mlp_dim)
        check_positive(temperature=temperature)
        check_finite(residual_beta=residual_beta, **({} if alpha_init is None else {"alpha_init": alpha_init}))
        self.hidden_size, self.proj_dim, self.mlp_dim = hidden_size, proj_dim, mlp_dim
        self.scorer, self.activation, self.fusion, self.value_activation = scorer, activation, fusion, value_activation
        self.temperature, self.residual_beta, self.alpha_init = temperature, residual_beta, alpha_init

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.target_proj = nn.Linear(hidden_size, proj_dim, bias=False, **factory)
        self.source_proj = None if share_projections else nn.Linear(hidden_size, proj_dim, bias=False, **factory)
        self.target_norm = nn.LayerNorm(proj_dim, **factory) if norm_projections else None
        self.source_norm = nn.LayerNorm(proj_dim, **factory) if norm_projections else None
        if scorer == "4term":
            self.pair_in = nn.Linear(4 * proj_dim, mlp_dim, **factory)
            self.pair_out = nn.Linear(mlp_dim, 1, **factory)
        elif scorer == "bilinear":
            self.pair_weight = nn.Parameter(torch.empty(proj_dim, proj_dim, **factory))
        width = 2 * max(128, hidden_size // 2)
        self.value_in = nn.Linear(FUSIONS[fusion] * hidden_size, width, **factory)
        self.value_out = nn.Linear(width, hidden_size, **factory)
        # One element, not a scalar: FSDP2 shards the first dimension.
        self.beta = nn.Parameter(torch.empty(1, **factory)) if value_residual else None
        self.alpha = nn.Parameter(torch.empty(1, **factory)) if alpha_init is not None else None
        self.dropout = nn.Dropout(dropout)
        self._start()

    def reset_parameters(self) -> None:
        """Draws the parameters anew: torch's default for Linear layers, Xavier's uniform rule for the bilinear form."""
        reset(*self.children())  # as their own constructors do
        self._start()

    def _start(self) -> None:
        # All layers are drawn a second time, only so that a seed gives the same weights as in earlier versions.
        reset(*self.children())
        if self.scorer == "bilinear":
            nn.init.xavier_uniform_(self.pair_weight)
        if self.beta is not None:
            nn.init.constant_(self.beta, self.residual_beta)
        if self.alpha is not None and self.alpha_init is not None:
            nn.init.constant_(self.alpha, self.alpha_init)

    def forward(
        self,
        target: Tensor,
        source: Tensor,
        *,
        key_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        return_entropy: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Computes the message to every target token.

        Args:
            target: ``[B, St, H]``.
            source: ``[B, Ss, H]``.
            key_mask: bool ``[B, Ss]``, True where a source token may be read.
            attn_mask: bool ``[B, St, Ss]``, True where a pair may act.
            return_entropy: also return the mean entropy of the rows in nats, a scalar.

        Returns:
            The message ``[B, St, H]``, or (message, entropy).

        Raises:
            TypeError: an input is not floating point, or a mask not bool.
            ValueError: shapes or devices disagree.
        """
        check_floats(target=target, source=source)
        check_mask("key_mask", key_mask, source)
        check_mask("attn_mask", attn_mask, source)
        layouts = {"target": "B St H", "source": "B Ss H", "key_mask": "B Ss", "attn_mask": "B St Ss"}
        check_shapes(layouts, target=target, source=source, key_mask=key_mask, attn_mask=attn_mask)
        source = _zero_unused(source, key_mask, attn_mask)
        context, entropy = self._attend(target, source, key_mask, attn_mask, return_entropy)
        message = self._fuse(context, target)
        if self.beta is not None:
            message = message + self.beta.to(message.dtype) * (context - target).to(message.dtype)
        if self.alpha is not None:
            message = message * self.alpha.to(message.dtype)
        message = self.dropout(message)
        return message if entropy is None else (message, entropy)

    def _attend(
        self,
        target: Tensor,
        source: Tensor,
        key_mask: Tensor | None,
        attn_mask: Tensor | None,
        return_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        query = self.target_proj(target)
        key = self.target_proj(source) if self.source_proj is None else self.source_proj(source)
        if self.target_norm is not None and self.source_norm is not None:
            query, key = self.target_norm(query).to(query.dtype), self.source_norm(key).to(key.dtype)
        options: dict[str, Any] = {
            "key_mask": key_mask,
            "attn_mask": attn_mask,
            "temperature": self.temperature,
            "return_entropy": return_entropy,
        }
        if self.scorer == "4term":
            pair = (self.pair_in.weight, self.pair_in.bias, self.pair_out.weight, self.pair_out.bias)
            out: Any = XF.hdim_attention(query, key, source, *pair, activation=self.activation, **options)
        elif self.scorer == "bilinear":
            out = XF.bilinear_attention(query, key, source, self.pair_weight, **options)
        else:
            out = XF.cosine_attention(query, key, source, **options)
        return out if return_entropy else (out, None)

    def _fuse(self, context: Tensor, target: Tensor) -> Tensor:
        hidden = XF.value_fusion(context, target, self.value_in.weight, self.value_in.bias, self.fusion)
        hidden = F.relu(hidden) if self.value_activation == "relu" else F.gelu(hidden)
        return self.value_out(hidden)

    def extra_repr(self) -> str:
        text = f"{self.hidden_size}, proj_dim={self.proj_dim}, scorer={self.scorer!r}, fusion={self.fusion!r}"
        if self.scorer == "4term":
            text += f", mlp_dim={self.mlp_dim}, activation={self.activation!r}"
        text += f", value_activation={self.value_activation!r}, temperature={self.temperature}"
        if self.source_proj is None:
            text += ", share_projections=True"
        if self.beta is not None:
            text += f", residual_beta={self.residual_beta}"
        return text if self.alpha_init is None else f"{text}, alpha_init={self.alpha_init}"


class QKVMessage(nn.Module):
    r"""Multi-head attention of a target layer's tokens over a source layer's, on inputs that are already projected.

    .. math:: m = \mathrm{softmax}(q k^\top / \sqrt{d})\, (v W_v^\top)

    per head, through :func:`torch.nn.functional.scaled_dot_product_attention`; :math:`W_v` is the identity unless
    ``extra_value_projection``. A batch element without an allowed key gets message 0. What masked keys and values hold
    changes nothing, not even NaN.

    Args:
        num_heads: number of heads h.
        head_dim: d, width of a head.
        dropout: probability, on the attention weights.
        extra_value_projection: add :math:`W_v`, ``Linear(head_dim, head_dim, bias=False)``, one for all heads.
        device, dtype: of :math:`W_v`.

    Shape:
        - query ``[B, St, h·d]``, key and value ``[B, Ss, h·d]``, key_mask bool ``[B, Ss]`` (True = may be used)
        - message ``[B, St, h·d]``

    Example::

        >>> message = QKVMessage(4, 16)
        >>> message(torch.randn(2, 10, 64), torch.randn(2, 12, 64), torch.randn(2, 12, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        dropout: float = 0.0,
        extra_value_projection: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(num_heads=num_heads, head_dim=head_dim)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
        self.num_heads, self.head_dim, self.dropout = num_heads, head_dim, dropout
        self.value_proj = (
            nn.Linear(head_dim, head_dim, bias=False, device=device, dtype=dtype) if extra_value_projection else None
        )

    def reset_parameters(self) -> None:
        """Draws the extra value projection anew, if there is one."""
        if self.value_proj is not None:
            self.value_proj.reset_parameters()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """Computes the message ``[B, St, h·d]`` to every target token.

        Args:
            query: of the target, ``[B, St, h·d]``.
            key, value: of the source, ``[B, Ss, h·d]``.
            key_mask: bool ``[B, Ss]``, True where a source token may be read.

        Raises:
            TypeError: an input is not floating point, or the mask not bool.
            ValueError: shapes or devices disagree.
        """
        check_floats(query=query, key=key, value=value)
        layouts = {"query": "B St H", "key": "B Ss H", "value": "B Ss H", "key_mask": "B Ss"}
        check_mask("key_mask", key_mask, query)
        check_shapes(layouts, query=query, key=key, value=value, key_mask=key_mask)
        width = self.num_heads * self.head_dim
        if query.shape[-1] != width:
            raise ValueError(
                f"query must have {width} features ({self.num_heads} heads × {self.head_dim}), got {query.shape[-1]}"
            )
        mask = None
        if key_mask is not None:
            key = key.masked_fill(~key_mask.unsqueeze(-1), 0)
            value = value.masked_fill(~key_mask.unsqueeze(-1), 0)
            empty = ~key_mask.any(1)[:, None, None]
            mask = (key_mask[:, None, :] | empty).unsqueeze(1)  # kernels differ on rows without a key
        query, key, value = (self._split_heads(t) for t in (query, key, value))
        if self.value_proj is not None:
            value = self.value_proj(value)
        dropout = self.dropout if self.training else 0.0
        message = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        message = message.transpose(1, 2).flatten(2)
        return message if key_mask is None else message.masked_fill(empty, 0)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def extra_repr(self) -> str:
        text = f"num_heads={self.num_heads}, head_dim={self.head_dim}, dropout={self.dropout}"
        return text if self.value_proj is None else f"{text}, extra_value_projection=True"


def _zero_unused(source: Tensor, key_mask: Tensor | None, attn_mask: Tensor | None) -> Tensor:
    """Zeroes source tokens that no target may use, so that NaN there does not reach the projection's gradient."""
    usable = key_mask
    if attn_mask is not None:
        seen = attn_mask.any(1)
        usable = seen if usable is None else usable & seen
    return source if usable is None else source.masked_fill(~usable.unsqueeze(-1), 0)
