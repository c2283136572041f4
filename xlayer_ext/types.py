"""Types that every layer shares: the names of choices, and the parameters of a hyper-connection.

It lies below all other modules of the package and imports none of them, so the reference uses it too.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

# Token-pair messaging
Activation = Literal["relu", "gelu"]
Fusion = Literal["concat_hadam", "concat_only", "concat_diff_hadam"]
Scorer = Literal["4term", "bilinear", "cosine"]

# Routing
RouterPooling = Literal["mean", "cls"]
RouterWeighting = Literal["topk_softmax", "full_softmax"]

# Hyper-connections
Form = Literal["identity", "tanh", "sinkhorn_rows", "sinkhorn_columns"]
HyperCoefficients = Literal["paper", "per_stream"]
HyperKind = Literal["static", "dynamic", "manifold"]
Norm = Literal["layer", "rms", "rms_all"]
Reduction = Literal["sum", "mean"]
StreamNorm = Literal["layer", "rms"]

# Quantization
Bound = Literal["tanh", "offset"]
Metric = Literal["euclidean", "cosine"]
Variant = Literal["package", "paper"]

# Aggregation over depth
TapPooling = Literal["mean", "first", "last", "attention"]


class Connection(NamedTuple):
    r"""Parameters that make a sublayer's coefficients from the n streams of width d before it.

    With z = norm(h)·weightᵀ per token, ``[n, n+2]``:

    * ``form="tanh"`` or ``"identity"``: c = base + scale ∘ act(z + bias). Hyper-connections.
    * ``form="sinkhorn_rows"`` or ``"sinkhorn_columns"``: a = base + scale ∘ z; the first column through σ, the last
      through 2σ, and Mᵀ, those between, through exp and ``sinkhorn_iters`` rounds of normalizing both axes of M, the
      rows last (:math:`\sum_j M_{ij} = 1`) or the columns last. Manifold-constrained hyper-connections.

    Without a weight the coefficients are the same for all tokens: ``base`` itself, or base put through σ and Sinkhorn.
    An affine norm folds into the weight: norm(h)·γ + b, times W, is ``weight = W∘γ`` and ``bias = W·b``.

    Attributes:
        base: ``[n, n+2]``.
        weight: ``[n+2, d]``, used on each stream; with ``norm="rms_all"`` ``[n·(n+2), n·d]``, row j·(n+2) + m for
            element (j, m), used on all streams of a token at once.
        bias: ``[n+2]``, or None for 0; none for ``sinkhorn_*``.
        scale: ``[n+2]``, wherever there is a weight.
        norm: ``"layer"`` or ``"rms"`` of each stream, ``"rms_all"`` of a token's streams together.
        form: see above.
        sinkhorn_iters: of Sinkhorn's algorithm.
        eps: added to the variance, or to the mean square.
    """

    base: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    norm: Norm = "layer"
    form: Form = "tanh"
    sinkhorn_iters: int = 20
    eps: float = 1e-5
