"""The ends of residual streams, and the connections of a whole network that agree with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, get_args

from torch import Tensor

from xlayer_ext.functional._checks import check_choice, check_flag, check_sizes
from xlayer_ext.nn.hyper import HyperConnection, ManifoldHyperConnection
from xlayer_ext.types import HyperKind, Reduction

KINDS = get_args(HyperKind)


class HyperConnections(NamedTuple):
    """Holds what a network with hyper-connections is made of; it unpacks as ``connect, expand, reduce``.

    Attributes:
        connect: ``connect(branch=None, **options)`` makes the connection of the next sublayer.
        expand: makes streams of the embeddings.
        reduce: makes one vector per token of the streams.
    """

    connect: Callable[..., HyperConnection | ManifoldHyperConnection]
    expand: Callable[[Tensor], Tensor]
    reduce: Callable[[Tensor], Tensor]


def hyper_connections(
    expansion_rate: int,
    *,
    hidden_size: int | None = None,
    kind: HyperKind = "dynamic",
    reduce: Reduction = "sum",
    packed: bool = False,
    disable: bool = False,
    **options: Any,
) -> HyperConnections:
    """Returns functions that connect sublayers, expand and reduce, which agree on the number of streams and the layout.

    ``connect`` numbers the connections that it makes, 0, 1, 2 …, as their ``layer_index``, so that the sublayers begin
    with different streams. It takes the place of ``get_init_and_expand_reduce_stream_functions`` of the PyPI package
    ``hyper-connections``.

    Args:
        expansion_rate: n, the number of streams.
        hidden_size: d; None: given to each call of ``connect``.
        kind: ``"dynamic"`` or ``"static"`` (:class:`HyperConnection`), or ``"manifold"``
            (:class:`ManifoldHyperConnection`).
        reduce: how the streams become one: ``"sum"`` (the paper) or ``"mean"``.
        packed: streams lie in the batch, ``[(b n), ..., d]``.
        disable: plain residual connections x + T(x) with the same calls: ``expand`` and ``reduce`` are the identity.
        options: further options of the connections, such as ``norm``, ``device`` and ``dtype``; a call of ``connect``
            may give others.

    Raises:
        TypeError: an unknown option.
        ValueError: an option is out of range; in ``connect``, no ``hidden_size``.

    Example::

        >>> connect, expand, reduce = hyper_connections(4, hidden_size=64, kind="manifold")
        >>> mlps = [torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 64)) for _ in range(3)]
        >>> blocks = torch.nn.Sequential(*(connect(branch=mlp) for mlp in mlps))
        >>> reduce(blocks(expand(torch.randn(2, 5, 64)))).shape, [block.layer_index for block in blocks]
        (torch.Size([2, 5, 64]), [0, 1, 2])
    """
    check_choice("kind", kind, KINDS)
    check_choice("reduce", reduce, get_args(Reduction))
    check_sizes(expansion_rate=expansion_rate)
    check_flag("disable", disable)
    made: type[HyperConnection] | type[ManifoldHyperConnection] = HyperConnection
    if kind == "manifold":
        made = ManifoldHyperConnection
    else:
        options = {"static_weights": kind == "static", **options}
    options = {"expansion_rate": expansion_rate, "packed": packed, "disable": disable, **options}
    if hidden_size is not None:
        made(hidden_size, **{**options, "device": "meta"})  # names a wrong option here, not at the first sublayer
        options["hidden_size"] = hidden_size
    numbers = itertools.count()

    def connect(branch: Callable[..., Any] | None = None, **own: Any) -> HyperConnection | ManifoldHyperConnection:
        given = {**options, **own}
        if "hidden_size" not in given:
            raise ValueError("connect needs hidden_size=, as hyper_connections() was given none")
        if "layer_index" not in given:
            given["layer_index"] = next(numbers)
        return made(given.pop("hidden_size"), branch=branch, **given)

    return HyperConnections(
        connect,
        partial(expand_streams, expansion_rate=expansion_rate, packed=packed, disable=disable),
        partial(reduce_streams, reduce=reduce, packed=packed, expansion_rate=expansion_rate, disable=disable),
    )


def expand_streams(x: Tensor, expansion_rate: int, *, packed: bool = False, disable: bool = False) -> Tensor:
    """Copies x to n streams: ``[..., d] → [..., n, d]``, or ``[b, ..., d] → [(b n), ..., d]`` if packed.

    Unpacked streams share the memory of ``x`` until the first sublayer writes its own. With ``disable`` x is returned
    as it is, for connections that are disabled.

    Example::

        >>> expand_streams(torch.randn(2, 5, 64), 4).shape, expand_streams(torch.randn(2, 5, 64), 4, packed=True).shape
        (torch.Size([2, 5, 4, 64]), torch.Size([8, 5, 64]))
    """
    check_sizes(expansion_rate=expansion_rate)
    if disable:
        return x
    if packed:
        return x.repeat_interleave(expansion_rate, 0)
    return x.unsqueeze(-2).expand(*x.shape[:-1], expansion_rate, x.shape[-1])


def reduce_streams(
    streams: Tensor,
    *,
    reduce: Reduction = "sum",
    packed: bool = False,
    expansion_rate: int | None = None,
    disable: bool = False,
) -> Tensor:
    """Reduces n streams to one by ``"sum"`` (the paper) or ``"mean"``. Packed streams need ``expansion_rate``.

    With ``disable`` the one stream of disabled connections is returned as it is.

    Example::

        >>> reduce_streams(torch.ones(2, 4, 3), reduce="mean")
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    check_choice("reduce", reduce, get_args(Reduction))
    if disable:
        return streams
    if packed:
        if expansion_rate is None:
            raise ValueError("packed streams do not tell their number: expansion_rate must be given")
        check_sizes(expansion_rate=expansion_rate)
        if streams.dim() < 1 or streams.shape[0] % expansion_rate:
            wanted = f"streams must have shape [(b n), ...] with n = {expansion_rate}"
            raise ValueError(f"{wanted}, got {list(streams.shape)}")
        streams, dim = streams.unflatten(0, (-1, expansion_rate)), 1
    else:
        dim = -2
    return streams.sum(dim) if reduce == "sum" else streams.mean(dim)
