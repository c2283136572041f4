"""Modules for hyper-connections: n residual streams with learned mixing around a sublayer."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from xlayer_ext import functional as XF
from xlayer_ext.functional import Connection
from xlayer_ext.functional._checks import (
    MAX_ITERATIONS,
    check_choice,
    check_flag,
    check_floats,
    check_integer,
    check_not_negative,
    check_sizes,
)
from xlayer_ext.nn._reset import assign
from xlayer_ext.types import Form, HyperCoefficients, StreamNorm

COEFFICIENTS = get_args(HyperCoefficients)
NORMS = get_args(StreamNorm)
INIT_READ = 0.75  # initial pre of a manifold-constrained sublayer's own stream; the others share the rest
INIT_DIAGONAL = 0.99  # initial diagonal of the manifold-constrained mixing
PYPI_EPS = 1e-24  # the PyPI package divides by the larger of a row's norm and 1e-12


class _StreamConnection(nn.Module):
    """Base of the kinds: pre, post and the boundary around a sublayer, in both layouts of the streams."""

    decayed: ClassVar[tuple[str, ...]] = ()  # parameters that weight decay is for

    def __init__(
        self,
        hidden_size: int,
        expansion_rate: int,
        eps: float,
        branch: Callable[..., Any] | None,
        packed: bool,
        disable: bool,
    ) -> None:
        super().__init__()
        check_sizes(hidden_size=hidden_size, expansion_rate=expansion_rate)
        check_not_negative(eps=eps)
        check_flag("disable", disable)
        self.hidden_size, self.expansion_rate, self.eps, self.packed = hidden_size, expansion_rate, eps, packed
        self.branch, self.disable = branch, disable

    def connection(self) -> Connection:
        """Returns the parameters in the form that the functional API takes.

        Raises:
            ValueError: the connection is disabled, and has none.
        """
        raise NotImplementedError

    def _check_enabled(self) -> None:
        if self.disable:
            raise ValueError("a connection with disable=True is a plain residual connection and has no coefficients")

    def pre(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        """Computes branch input x ``[..., d]`` and coefficients from streams in this module's layout.

        With ``disable`` the streams are the branch input, and the coefficients an empty tensor.

        Raises:
            TypeError: the streams are not floating point.
            ValueError: the streams have another shape.
        """
        if self.disable:
            self._check_plain(streams)
            return streams, streams.new_empty(0)
        x, coefficients = XF.hyper_pre(self._unpack(streams), self.connection())
        return self._row(x, streams), coefficients

    def post(self, streams: Tensor, branch_output: Tensor, coefficients: Tensor) -> Tensor:
        """Computes the streams after a sublayer from its output ``[..., d]`` and the coefficients of :meth:`pre`.

        Raises:
            TypeError: an input is not floating point.
            ValueError: shapes disagree.
        """
        if self.disable:
            self._check_plain(streams)
            check_floats(branch_output=branch_output)
            if branch_output.shape != streams.shape:
                raise ValueError(
                    f"branch_output must have shape {list(streams.shape)}, that of the one residual stream "
                    f"(disable=True), got {list(branch_output.shape)}"
                )
            return streams + branch_output.to(streams.dtype)
        unpacked = self._unpack(streams)
        return self._pack(XF.hyper_post(unpacked, self._flat(branch_output, unpacked), coefficients), streams)

    def boundary(self, streams: Tensor, branch_output: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes post of the sublayer before and pre of this one, fused: streams, branch input, coefficients.

        ``coefficients`` are those of the sublayer before; the result's are this one's. It equals the two calls, in one
        pass over memory. A stack of sublayers begins with one :meth:`pre` and ends with one :meth:`post`.

        Raises:
            TypeError: an input is not floating point.
            ValueError: shapes disagree.

        Example::

            >>> connections = [HyperConnection(64, expansion_rate=4, layer_index=i) for i in range(3)]
            >>> sublayers = [torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 64)) for _ in range(3)]
            >>> streams = expand_streams(torch.randn(2, 5, 64), 4)
            >>> x, coefficients = connections[0].pre(streams)
            >>> y = sublayers[0](x)
            >>> for connection, sublayer in zip(connections[1:], sublayers[1:]):
            ...     streams, x, coefficients = connection.boundary(streams, y, coefficients)
            ...     y = sublayer(x)
            >>> reduce_streams(connections[-1].post(streams, y, coefficients)).shape
            torch.Size([2, 5, 64])
        """
        if self.disable:
            streams = self.post(streams, branch_output, coefficients)
            return streams, *self.pre(streams)
        unpacked = self._unpack(streams)
        branch_output = self._flat(branch_output, unpacked)
        out, x, own = XF.hyper_post_pre(unpacked, branch_output, coefficients, self.connection())
        return self._pack(out, streams), self._row(x, streams), own

    def forward(self, streams: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the branch between pre and post, or gives both ends to the caller.

        Args:
            streams: ``[..., n, d]``, as :func:`expand_streams` makes them, or ``[(b n), ..., d]`` if packed.
            args, kwargs: further arguments of the branch.

        Returns:
            With a branch what it returns, its first tensor replaced by the new streams. Without one (x ``[..., d]``,
            ``add_residual``), a function from the sublayer's output to the new streams.

        Raises:
            TypeError: the streams are not floating point.
            ValueError: the streams have another shape.
        """
        x, coefficients = self.pre(streams)

        def add_residual(branch_output: Any) -> Any:
            (first, *rest), structure = tree_flatten(branch_output)
            return tree_unflatten([self.post(streams, first, coefficients), *rest], structure)

        return (x, add_residual) if self.branch is None else add_residual(self.branch(x, *args, **kwargs))

    def extra_repr(self) -> str:
        disabled = ", disable=True" if self.disable else ""
        return f"{self.hidden_size}, expansion_rate={self.expansion_rate}, packed={self.packed}{disabled}"

    def _check_plain(self, streams: Tensor) -> None:
        """Checks the one stream of a disabled connection."""
        check_floats(streams=streams)
        if streams.dim() < 1 or streams.shape[-1] != self.hidden_size:
            wanted = f"streams must have shape [..., {self.hidden_size}]"
            raise ValueError(f"{wanted} (disable=True: one residual stream), got {list(streams.shape)}")

    # Packed streams are [(b n), ..., d]; here n becomes the last but one dimension, of the same memory.

    def _unpack(self, streams: Tensor) -> Tensor:
        check_floats(streams=streams)
        n, d = self.expansion_rate, self.hidden_size
        if not self.packed:
            if streams.dim() < 2 or streams.shape[-2:] != (n, d):
                how = f"expand_streams(x, {n}) makes {n} streams of x [..., {d}]"
                raise ValueError(f"streams must have shape [..., {n}, {d}], got {list(streams.shape)}; {how}")
            return streams
        if streams.dim() < 2 or streams.shape[0] % n or streams.shape[-1] != d:
            how = f"expand_streams(x, {n}, packed=True) makes {n} streams of x [b, ..., {d}]"
            wanted = f"streams must have shape [(b n), ..., d] with n = {n}, d = {d}"
            raise ValueError(f"{wanted}; got {list(streams.shape)}; {how}")
        streams = streams.unflatten(0, (-1, n))
        return streams if streams.dim() == 3 else streams.flatten(2, -2).transpose(1, 2)

    def _pack(self, unpacked: Tensor, like: Tensor) -> Tensor:
        return (
            (unpacked.transpose(1, 2) if unpacked.dim() == 4 else unpacked).reshape(like.shape)
            if self.packed
            else unpacked
        )

    def _row(self, x: Tensor, streams: Tensor) -> Tensor:
        return x.reshape(-1, *streams.shape[1:]) if self.packed else x

    def _flat(self, branch_output: Tensor, unpacked: Tensor) -> Tensor:
        return branch_output.reshape(*unpacked.shape[:-2], -1) if self.packed else branch_output


class HyperConnection(_StreamConnection):
    r"""Static (SHC) or dynamic (DHC) hyper-connection around one sublayer T.

    .. math::
        x = \sum_j \alpha_{j0} h_j, \qquad y = T(x), \qquad h'_k = \beta_k y + \sum_j \alpha_{jk} h_j

    α ``[n, n+1]`` and β ``[n]`` are parameters; in DHC every token adds
    :math:`s_\alpha \tanh(\mathrm{norm}(h_j) W_\alpha)` to row j of α and
    :math:`s_\beta \tanh(\mathrm{norm}(h_j) w_\beta)` to β_j. It starts as the residual connection of a pre-norm net:
    α = [one-hot(layer_index mod n) | I], β = 1, W = 0, s = 0.01.

    Weight decay is for the dynamic weights alone (``decayed`` names them), as in the paper.

    Args:
        hidden_size: width of a stream, d.
        expansion_rate: n, the number of streams.
        layer_index: which stream the sublayer reads at first.
        static_weights: SHC instead of DHC.
        use_tanh: whether DHC has the tanh.
        norm: ``"layer"`` (the paper) or ``"rms"``, with their affine parameters.
        eps: of the norm.
        branch: T; with it, calling the module gives the new streams. Where it returns more than one tensor, the first
            is y and the others are passed through.
        packed: streams lie in the batch, ``[(b n), ..., d]``, as in the PyPI package ``hyper-connections``, instead of
            ``[..., n, d]``. Nothing is copied for it.
        disable: a plain residual connection x + T(x) instead, with the same calls: one stream ``[..., d]``, no
            parameters. :func:`expand_streams` and :func:`reduce_streams` take ``disable`` too;
            :func:`hyper_connections` gives all three the same.
        device, dtype: of the parameters; the coefficients are computed in float32 at least, whatever it is.

    Shape:
        - streams: ``[..., n, d]``, or ``[(b n), ..., d]`` if packed; every dtype. A sequence of n tokens has such a
          shape too, ``[b, n, d]``: given without :func:`expand_streams`, its tokens are mixed as streams, and no error
          tells
        - without a branch the result is (x ``[..., d]``, ``add_residual``), a function from y to the new streams

    Paper: Zhu et al., Hyper-Connections, ICLR 2025, arXiv 2409.19606.

    Example::

        >>> mlp = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 64))
        >>> block = HyperConnection(64, expansion_rate=4, branch=mlp)
        >>> streams = expand_streams(torch.randn(2, 5, 64), 4)
        >>> reduce_streams(block(streams)).shape
        torch.Size([2, 5, 64])
    """

    decayed = ("dynamic_alpha", "dynamic_beta")

    def __init__(
        self,
        hidden_size: int,
        *,
        expansion_rate: int = 4,
        layer_index: int = 0,
        static_weights: bool = False,
        use_tanh: bool = True,
        norm: StreamNorm = "layer",
        eps: float = 1e-5,
        branch: Callable[..., Any] | None = None,
        packed: bool = False,
        disable: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, expansion_rate, eps, branch, packed, disable)
        check_choice("norm", norm, NORMS)
        check_integer("layer_index", layer_index)
        n, d = expansion_rate, hidden_size
        parameter = partial(_parameter, device, dtype)
        self.layer_index, self.static_weights, self.use_tanh, self.norm = layer_index, static_weights, use_tanh, norm
        if disable:
            return
        self.static_alpha, self.static_beta = parameter(n, n + 1), parameter(n)
        if not static_weights:
            self.norm_weight = parameter(d)
            if norm == "layer":
                self.norm_bias = parameter(d)
            self.dynamic_alpha, self.dynamic_beta = parameter(d, n + 1), parameter(d)
            # One element, not a scalar: FSDP2 shards the first dimension.
            self.alpha_scale, self.beta_scale = parameter(1), parameter(1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the connection, not its branch, back to the residual connection."""
        if self.disable:
            return
        n = self.expansion_rate
        alpha = torch.eye(n, device="cpu")
        assign(self.static_alpha, torch.cat([alpha[:, self.layer_index % n, None], alpha], 1))
        with torch.no_grad():
            self.static_beta.fill_(1)
            if self.static_weights:
                return
            self.norm_weight.fill_(1)
            if self.norm == "layer":
                self.norm_bias.zero_()
            self.dynamic_alpha.zero_()
            self.dynamic_beta.zero_()
            self.alpha_scale.fill_(0.01)
            self.beta_scale.fill_(0.01)

    def connection(self) -> Connection:
        self._check_enabled()
        base = torch.cat([self.static_alpha, self.static_beta.unsqueeze(1)], 1)
        if self.static_weights:
            return Connection(base)
        weight = torch.cat([self.dynamic_alpha, self.dynamic_beta.unsqueeze(1)], 1)
        scale = torch.cat([self.alpha_scale.expand(self.expansion_rate + 1), self.beta_scale])
        # No matrix product: autocast would round it.
        bias = (self.norm_bias.unsqueeze(1) * weight).sum(0) if self.norm == "layer" else None
        form: Form = "tanh" if self.use_tanh else "identity"
        return Connection(base, _folded(weight, self.norm_weight), bias, scale, self.norm, form, eps=self.eps)

    @classmethod
    def from_hyper_connections(cls, module: nn.Module) -> HyperConnection:
        """Makes the same connection as a ``HyperConnections`` of the PyPI package, with its weights and branch.

        Raises:
            ValueError: it has options that are not here (fractions, several input views, channels first, dropout, …).
        """
        theirs: Any = module
        _refuse_unsupported(theirs)
        weight = theirs.static_alpha
        made = cls(
            theirs.dynamic_alpha_fn.shape[0], expansion_rate=weight.shape[0], use_tanh=isinstance(theirs.act, nn.Tanh),
            norm="rms", eps=PYPI_EPS, branch=theirs.branch, packed=True,
        ).to(weight.device, weight.dtype)  # fmt: skip
        names = {
            "static_alpha": "static_alpha", "static_beta": "static_beta", "dynamic_alpha": "dynamic_alpha_fn",
            "dynamic_beta": "dynamic_beta_fn", "alpha_scale": "dynamic_alpha_scale", "beta_scale": "dynamic_beta_scale",
        }  # fmt: skip
        return _with_weights(made, theirs, names)

    def extra_repr(self) -> str:
        kind = "static_weights=True" if self.static_weights else f"use_tanh={self.use_tanh}, norm={self.norm!r}"
        return f"{super().extra_repr()}, layer_index={self.layer_index}, {kind}"


class ManifoldHyperConnection(_StreamConnection):
    r"""Manifold-constrained hyper-connection (mHC): the streams' mixing is doubly stochastic.

    .. math:: x = \sum_j \mathrm{pre}_j h_j, \qquad y = T(x), \qquad h'_i = \mathrm{post}_i\, y + \sum_j M_{ij} h_j

    pre = σ(·) in (0, 1), post = 2σ(·) in (0, 2), M = Sinkhorn–Knopp(exp(·)), ``sinkhorn_iters`` rounds. Per
    token they are made of:

    * ``coefficients="paper"``: :math:`a \cdot \mathrm{RMSNorm}([h_1; \dots; h_n])\, \varphi + b`, φ
      ``[n·d, n²+2n]`` with columns pre (n), post (n), M (n², row by row). Columns of M are normalized, then rows: rows
      sum to 1.
    * ``coefficients="per_stream"``: the form of the PyPI package: row j from RMSNorm(h_j), one weight ``[d, n+2]`` for
      all streams; the sums over i of M_ij, normalized last, are 1.

    Starts as the residual connection where the streams are copies of each other: the weights are 0, pre adds up to 1
    (three quarters of it for stream layer_index mod n), post = 1 and M is near the identity. Weight decay is for the
    dynamic weights alone (``decayed`` names them).

    Args:
        hidden_size: width of a stream, d.
        expansion_rate: n, the number of streams.
        layer_index: which stream the sublayer reads most of at first; give each sublayer its number.
        coefficients: ``"paper"`` or ``"per_stream"``.
        sinkhorn_iters: of Sinkhorn–Knopp.
        eps: of the RMSNorm.
        branch, packed, disable, device, dtype: as in :class:`HyperConnection`.

    Shape:
        - as in :class:`HyperConnection`

    Paper: mHC, Manifold-Constrained Hyper-Connections, arXiv 2512.24880.

    Example::

        >>> attention = ManifoldHyperConnection(64, expansion_rate=4)
        >>> streams = expand_streams(torch.randn(2, 5, 64), 4)
        >>> x, add_residual = attention(streams)
        >>> add_residual(torch.tanh(x)).shape
        torch.Size([2, 5, 4, 64])
    """

    decayed = ("phi", "dynamic_alpha", "dynamic_beta")

    def __init__(
        self,
        hidden_size: int,
        *,
        expansion_rate: int = 4,
        layer_index: int = 0,
        coefficients: HyperCoefficients = "paper",
        sinkhorn_iters: int = 20,
        eps: float = 1e-6,
        branch: Callable[..., Any] | None = None,
        packed: bool = False,
        disable: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, expansion_rate, eps, branch, packed, disable)
        check_choice("coefficients", coefficients, COEFFICIENTS)
        check_integer("sinkhorn_iters", sinkhorn_iters, 1, MAX_ITERATIONS)
        check_integer("layer_index", layer_index)
        n, d = expansion_rate, hidden_size
        parameter = partial(_parameter, device, dtype)
        self.layer_index, self.coefficients, self.sinkhorn_iters = layer_index, coefficients, sinkhorn_iters
        if disable:
            return
        if coefficients == "paper":
            self.norm_weight = parameter(n * d)
            self.phi = parameter(n * d, n * (n + 2))
            self.b_pre, self.b_post = parameter(n), parameter(n)
            self.b_res = parameter(n, n)
        else:
            self.norm_weight = parameter(d)
            self.dynamic_alpha, self.dynamic_beta = parameter(d, n + 1), parameter(d)
            self.static_alpha, self.static_beta = parameter(n, n + 1), parameter(n)
        self.pre_scale, self.residual_scale, self.post_scale = (parameter(1) for _ in range(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the connection, not its branch, back to the residual connection."""
        if self.disable:
            return
        n = self.expansion_rate
        logit = math.log((n - 1) * INIT_DIAGONAL / (1 - INIT_DIAGONAL)) if n > 1 else 0.0
        mixing = logit * torch.eye(n, dtype=torch.float64, device="cpu")
        with torch.no_grad():
            self.norm_weight.fill_(1)
            for scale in (self.pre_scale, self.residual_scale, self.post_scale):
                scale.fill_(0.01)
            if self.coefficients == "paper":
                self.phi.zero_()
                assign(self.b_pre, self._start_reading())
                self.b_post.zero_()
                assign(self.b_res, mixing)
            else:
                self.dynamic_alpha.zero_()
                self.dynamic_beta.zero_()
                assign(self.static_alpha, torch.cat([self._start_reading().unsqueeze(1), mixing], 1))
                self.static_beta.zero_()

    def _start_reading(self) -> Tensor:
        """Returns logits of pre ``[n]``, which adds up to 1 and differs between sublayers: if all streams were alike
        to all sublayers, they would get the same gradients and stay copies of each other."""
        n = self.expansion_rate
        if n == 1:
            return torch.tensor([20.0], dtype=torch.float64, device="cpu")  # σ of it is 1 but for 2e-9
        others = (1 - INIT_READ) / (n - 1)
        logits = torch.full((n,), math.log(others / (1 - others)), dtype=torch.float64, device="cpu")
        logits[self.layer_index % n] = math.log(INIT_READ / (1 - INIT_READ))
        return logits

    def connection(self) -> Connection:
        self._check_enabled()
        n = self.expansion_rate
        scale = torch.cat([self.pre_scale, self.residual_scale.expand(n), self.post_scale])
        if self.coefficients == "per_stream":
            base = torch.cat([self.static_alpha, self.static_beta.unsqueeze(1)], 1)
            weight = torch.cat([self.dynamic_alpha, self.dynamic_beta.unsqueeze(1)], 1)
            weight = _folded(weight, self.norm_weight)
            return Connection(base, weight, None, scale, "rms", "sinkhorn_columns", self.sinkhorn_iters, self.eps)
        # Row j of what the kernel calls base is (pre_j, M_1j … M_nj, post_j).
        base = torch.cat([self.b_pre.unsqueeze(1), self.b_res.t(), self.b_post.unsqueeze(1)], 1)
        pre, post, mixing = _folded(self.phi, self.norm_weight).split([n, n, n * n])
        rows = [pre.unsqueeze(1), mixing.unflatten(0, (n, n)).transpose(0, 1), post.unsqueeze(1)]
        weight = torch.cat(rows, 1).flatten(0, 1)
        return Connection(base, weight, None, scale, "rms_all", "sinkhorn_rows", self.sinkhorn_iters, self.eps)

    @classmethod
    def from_hyper_connections(cls, module: nn.Module, *, sinkhorn_iters: int = 20) -> ManifoldHyperConnection:
        """Makes the same connection as a ``ManifoldConstrainedHyperConnections`` of the PyPI package, with its weights.

        Args:
            module: theirs.
            sinkhorn_iters: to be given again where it was made with other than 20, for it keeps them where they cannot
                be read.

        Raises:
            ValueError: it has options that are not here.
        """
        theirs: Any = module
        _refuse_unsupported(theirs)
        if theirs.num_dynamic_alpha_proposals > 1:
            raise ValueError("hyper-connections with several dynamic alpha proposals cannot be taken over")
        weight = theirs.static_alpha
        made = cls(
            theirs.dynamic_alpha_fn.shape[1], expansion_rate=weight.shape[0], coefficients="per_stream",
            sinkhorn_iters=sinkhorn_iters, eps=PYPI_EPS, branch=theirs.branch, packed=True,
        ).to(weight.device, weight.dtype)  # fmt: skip
        names = {
            "static_alpha": "static_alpha", "static_beta": "static_beta", "dynamic_alpha": "dynamic_alpha_fn",
            "dynamic_beta": "dynamic_beta_fn", "pre_scale": "pre_branch_scale", "residual_scale": "residual_scale",
            "post_scale": "h_post_scale",
        }  # fmt: skip
        return _with_weights(made, theirs, names)

    def extra_repr(self) -> str:
        how = f"coefficients={self.coefficients!r}, sinkhorn_iters={self.sinkhorn_iters}"
        return f"{super().extra_repr()}, layer_index={self.layer_index}, {how}"


def no_weight_decay(module: nn.Module) -> set[str]:
    """Names the parameters of ``module``'s hyper-connections that have no weight decay, as in the paper.

    That is all but the dynamic weights.

    Example::

        >>> sorted(no_weight_decay(HyperConnection(64, static_weights=True)))
        ['static_alpha', 'static_beta']
    """
    names: set[str] = set()
    for prefix, owner in module.named_modules():
        if isinstance(owner, _StreamConnection):
            own = (name for name, _ in owner.named_parameters(recurse=False) if name not in owner.decayed)
            names.update(f"{prefix}.{name}" if prefix else name for name in own)
    return names


def _parameter(device: torch.device | str | None, dtype: torch.dtype | None, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))


def _folded(weight: Tensor, norm_weight: Tensor) -> Tensor:
    """Folds a norm's weight ``[d]`` into the matrix ``[d, m]`` of the product that follows; returns ``[m, d]``."""
    return (weight * norm_weight.unsqueeze(1)).t()


def _refuse_unsupported(theirs: Any) -> None:
    plain = {"num_fracs": 1, "num_input_views": 1, "channel_first": False, "add_branch_out_to_residual": True}
    wrong = [f"{name}={getattr(theirs, name)}" for name, value in plain.items() if getattr(theirs, name) != value]
    if theirs.dropout.p:
        wrong.append(f"dropout={theirs.dropout.p}")
    if getattr(theirs.depth_residual_fn, "__name__", "") != "add":
        wrong.append("a depth_residual_fn of its own")
    if not isinstance(getattr(theirs, "residual_transform", nn.Identity()), nn.Identity):
        wrong.append("a residual_transform")
    if wrong:
        raise ValueError(f"hyper-connections with {', '.join(wrong)} cannot be taken over")


def _with_weights(made: Any, theirs: Any, names: dict[str, str]) -> Any:
    with torch.no_grad():
        made.norm_weight.copy_(theirs.norm.gamma + 1)
        for ours, name in names.items():
            target = getattr(made, ours)
            target.copy_(getattr(theirs, name).reshape(target.shape))
    return made
