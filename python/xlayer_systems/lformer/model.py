"""L-Former: a causal language model with a side path that taps its layers and carries a state across them.

The base is a Hugging Face model and stays as it is: a hook on its decoder reads the hidden states and, with
``blend_into_lm``, adds the state to what the language model's head reads. States aggregate over depth, at one token, so
cached generation needs no cache of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import register_dataclass
from transformers import GPT2Config, GPT2LMHeadModel

from xlayer_systems.data.blocks import IGNORED
from xlayer_systems.hf.layers import layers_of
from xlayer_systems.hf.pretrained import (
    DESCRIBED,
    Attachment,
    check_model,
    check_state,
    describe_model,
    read_config,
    read_own,
    resolve_config,
    save_own,
    weights_fingerprint,
)
from xlayer_systems.lformer.config import ModelConfig
from xlayer_systems.lformer.path import Heads, SidePath, make_path

PHASES = ("joint", "a", "b")
CONFIG_FILE = "lformer_config.json"
WEIGHTS_FILE = "lformer.safetensors"
SAMPLE = 1024  # elements of each frozen parameter that identify a base
_MARK = "_lformer"  # on a decoder that has one


@dataclass
class LFormerOutput:
    """Holds the output of an L-Former; also by name, ``output["logits_lm"]``, where it is not None.

    No `transformers.utils.ModelOutput`: the field ``values`` would hide the method by which wrappers such as FSDP2's
    take one apart.

    Attributes:
        loss: weighted sum of the losses, None without targets.
        losses: by name: tool, value, plan, lm in nats or squares, before their weights; gates, weighted.
        logits_lm: ``[B, S, V]``.
        logits_tools: ``[B, num_tools]``.
        values: ``[B]``, in the units of the targets.
        plan: ``[B, plan_length]``, the most likely steps, −100 behind the end.
        states: of the side path, ``[L, B, side_size]``, per token ``[L, B, S, side_size]``; in training the last alone.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    logits_lm: Tensor | None = None
    logits_tools: Tensor | None = None
    values: Tensor | None = None
    plan: Tensor | None = None
    states: Tensor | None = None

    def keys(self) -> list[str]:
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)


register_dataclass(LFormerOutput)


class LFormer(Attachment):
    """Is a causal language model with its side path and the heads on the state.

    A base that is made here is trained with the rest (phase ``joint``), one that is attached is frozen (phase ``a``);
    see `set_phase`.

    Args:
        config: sizes and options.
        base: a Hugging Face causal language model, which is changed in place; None makes a GPT-2 of ``config``'s sizes.

    Raises:
        ValueError: the base is no such model or has a side path already; options that do not fit it.

    Example::

        >>> model = LFormer(ModelConfig.tiny())
        >>> output = model(torch.randint(0, 1000, (2, 10)), tools=torch.tensor([0, 3]))
        >>> output["logits_lm"].shape, output["logits_tools"].shape, sorted(output["losses"])
        (torch.Size([2, 10, 1000]), torch.Size([2, 5]), ['tool'])
    """

    part = "side path"

    def __init__(self, config: ModelConfig, base: Any = None) -> None:
        super().__init__()
        self.config, self.owns_base = config, base is None
        self.base = make_base(config) if base is None else base
        decoder, layers = _parts(self.base)
        if config.last_k_unfreeze > len(layers):
            wanted = config.last_k_unfreeze
            raise ValueError(f"last_k_unfreeze must be at most the base's {len(layers)} layers, got {wanted}")
        width = int(self.base.config.get_text_config().hidden_size)
        self.path = make_path(config, len(layers), width)
        self.heads = Heads(config)
        if config.blend_into_lm:
            self.blend = nn.Linear(config.side_size, width, bias=False)
            self.blend_gate = nn.Parameter(torch.zeros(1, device=self.base.device, dtype=self.base.dtype))
        if hasattr(decoder, _MARK):
            raise ValueError("this model has a side path already; call its remove() first")
        for module in self.children():
            if module is not self.base:
                module.to(device=self.base.device, dtype=self.base.dtype)
        self._was = [parameter.requires_grad for parameter in self.base.parameters()], self.base.training
        self._seen: _Seen | None = None
        self._reading = self._asked = False
        self._hooks = [
            decoder.register_forward_pre_hook(self._request_states, with_kwargs=True),
            decoder.register_forward_hook(self._collect_states, with_kwargs=True),
        ]
        setattr(decoder, _MARK, True)
        self.phase = "joint"
        if base is not None:
            self.set_phase("a")
            self._join(base)

    def set_phase(self, phase: str) -> LFormer:
        """Sets the phase. ``a``: the base is frozen, in evaluation mode, without gradients. ``b``: its last
        ``last_k_unfreeze`` layers train too, end to end. ``joint``: everything trains, and ``detach_taps`` says whether
        the side path's losses reach the base."""
        if phase not in PHASES:
            raise ValueError(f"phase must be one of {', '.join(PHASES)}; got {phase!r}")
        self.phase = phase
        self.base.requires_grad_(phase == "joint")
        if phase == "b":
            for parameter in self.unfrozen():
                parameter.requires_grad_(True)
        return self.train(self.training)

    def train(self, mode: bool = True) -> LFormer:
        """Sets the mode as every module does, except that a frozen base stays in evaluation mode."""
        super().train(mode)
        if self.phase == "a":
            self.base.eval()
        return self

    def unfrozen(self) -> list[nn.Parameter]:
        """Returns parameters of the base's last ``last_k_unfreeze`` layers."""
        layers = _parts(self.base)[1]
        chosen = layers[len(layers) - self.config.last_k_unfreeze :]
        return [parameter for layer in chosen for parameter in layer.parameters()]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        tools: Tensor | None = None,
        values: Tensor | None = None,
        plan: Tensor | None = None,
        *,
        logits: bool = True,
        reason: bool = True,
    ) -> LFormerOutput:
        """Computes the predictions, and the losses of the targets that are given.

        Args:
            input_ids: ``[B, S]``.
            attention_mask: ``[B, S]``, 1 where a token counts.
            labels: ``[B, S]``, the token after each of ``input_ids``, −100 where nothing is to be predicted.
            tools: ``[B]``, indices.
            values: ``[B]``.
            plan: ``[B, P]``, steps, −100 behind the end.
            logits: False leaves the language model's head out where it is not needed.
            reason: False leaves the heads out.
        """
        seen, logits_lm = self._run_base(input_ids, attention_mask, logits or labels is not None)
        losses: dict[str, Tensor] = {}
        if labels is not None and logits_lm is not None:
            flat = logits_lm.float().flatten(0, 1)
            losses["lm"] = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED)
        output = LFormerOutput(logits_lm=logits_lm)
        if reason:
            mask = None if attention_mask is None else attention_mask.bool()
            output.states = self._states(seen, mask, last_only=self.training)
            state = output.states[-1] if self.config.is_sequence_wise else last_counted(output.states[-1], mask)
            losses |= self._use_heads(output, state, tools, values, plan)
            losses |= self._gate_losses() if losses else {}
        output.losses = losses
        if losses:
            output.loss = torch.stack([self._weight(name) * loss for name, loss in losses.items()]).sum()
        return output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the base's ``generate``, with the state blended in if ``blend_into_lm`` is set."""
        return self.base.generate(*args, **kwargs)

    def remove(self) -> Any:
        """Detaches the side path and returns the base, as trainable as it was."""
        for hook in self._hooks:
            hook.remove()
        self._leave()
        decoder = _parts(self.base)[0]
        if hasattr(decoder, _MARK):
            delattr(decoder, _MARK)
        for parameter, requires_grad in zip(self.base.parameters(), self._was[0], strict=True):
            parameter.requires_grad_(requires_grad)
        return self.base.train(self._was[1])

    # ---- files -------------------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Tensor]:
        """Returns side path, heads and the base's layers that phase B trains; everything of a base made here."""
        state = self.state_dict()
        if self.owns_base:  # each tensor once: a tied head has the embedding's
            names = {name for name, _ in [*self.named_parameters(), *self.named_buffers()]}
            return {name: tensor for name, tensor in state.items() if name in names}
        trained = {id(parameter) for parameter in self.unfrozen()}
        names = {name for name, parameter in self.named_parameters() if id(parameter) in trained}
        return {name: tensor for name, tensor in state.items() if not name.startswith("base.") or name in names}

    def describe_base(self) -> dict[str, Any]:
        """Identifies an attached base: kind, sizes, and a hash over its frozen parameters."""
        trained = {id(parameter) for parameter in self.unfrozen()}
        frozen = [(name, p) for name, p in self.base.named_parameters() if id(p) not in trained]
        sizes = describe_model(SimpleNamespace(config=self.base.config.get_text_config()), (*DESCRIBED, "vocab_size"))
        return {**sizes, "weights": weights_fingerprint(frozen, SAMPLE, list)}

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the own parameters and the configuration into ``directory``, made if missing.

        Of an attached base only the layers that phase B trains are written, and an identification of the base.
        """
        settings = {"config": asdict(self.config), "base": None if self.owns_base else self.describe_base()}
        save_own(Path(directory), self.own_state(), WEIGHTS_FILE, settings, CONFIG_FILE)

    @classmethod
    def from_pretrained(cls, directory: str | Path, base: Any = None) -> LFormer:
        """Loads what `save_pretrained` wrote, onto ``base``, the same model as then, where it was not made here.

        Raises:
            ValueError: files are missing or do not fit each other, or ``base`` is another model; it is then as it was.
        """
        directory = Path(directory)
        saved, state = read_own(directory, "L-Former", WEIGHTS_FILE, CONFIG_FILE)
        config = read_config(ModelConfig, saved["config"], directory)
        if (base is None) != (saved["base"] is None):
            needs = "needs the base that it was attached to"
            raise ValueError(
                f"the L-Former in {directory} {needs if base is None else 'brings its own base, and takes no other'}"
            )
        model = cls(config, base)
        try:
            if saved["base"] is not None:
                check_model(saved["base"], model.describe_base(), directory)
            check_state(state, model.own_state(), directory)
        except ValueError:
            model.remove()
            raise
        model.load_state_dict(state, strict=False)
        return model

    @classmethod
    def load(cls, model: Any, folder: str | Path) -> LFormer:
        """Attaches what `save` wrote: `from_pretrained`."""
        return cls.from_pretrained(folder, model)

    def gradient_checkpointing_enable(self) -> None:
        """Recomputes each layer of the base in backward."""
        self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    # ---- the base and its hooks --------------------------------------------------------------------------------------

    @property
    def detaches(self) -> bool:
        """Tells whether the side path's losses stop at the taps."""
        return self.phase == "a" or (self.phase == "joint" and self.config.detach_taps)

    def _run_base(self, input_ids: Tensor, attention_mask: Tensor | None, logits: bool) -> tuple[_Seen, Tensor | None]:
        run = self.base if logits else _parts(self.base)[0]
        self._reading = True
        try:
            output = run(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            seen = self._seen
        finally:
            self._reading, self._seen = False, None
        assert seen is not None
        return seen, output.logits if logits else None

    def _request_states(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Makes the decoder return all its hidden states; a hook before its forward."""
        if not (self._reading or self.config.blend_into_lm):
            return None
        self._asked = bool(kwargs.get("output_hidden_states", decoder.config.output_hidden_states))
        return args, {**kwargs, "output_hidden_states": True, "return_dict": True}

    def _collect_states(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Keeps the hidden states, and blends the state into what the language model's head reads."""
        blends = self.config.blend_into_lm
        if not (self._reading or blends):
            return None
        last, seen = output.last_hidden_state, _Seen(output.hidden_states)
        if self.phase == "a":
            last = last.detach()
        if blends:
            seen.states = self._states(seen, None, last_only=self.training or not self._reading)
            last = last + self.blend_gate.tanh() * self.blend(seen.states[-1])
        if self._reading:
            self._seen = seen
        kept = {name: value for name, value in output.items() if name != "hidden_states" or self._asked}
        return type(output)(**{**kept, "last_hidden_state": last})

    def _states(self, seen: _Seen, mask: Tensor | None, last_only: bool) -> Tensor:
        if seen.states is not None:
            return seen.states
        hidden = [state.detach() for state in seen.hidden] if self.detaches else seen.hidden
        states: Tensor = self.path(hidden, mask if self.config.is_sequence_wise else None, last_only)
        return states

    # ---- the heads ---------------------------------------------------------------------------------------------------

    def _use_heads(
        self, output: LFormerOutput, state: Tensor, tools: Tensor | None, values: Tensor | None, plan: Tensor | None
    ) -> dict[str, Tensor]:
        """Fills in the predictions from ``state [B, side_size]``, and returns the losses of the targets."""
        heads, losses = self.heads, {}
        state = heads.norm(state)
        if heads.tool is not None:
            output.logits_tools = heads.tool(state)
            if tools is not None:
                losses["tool"] = F.cross_entropy(output.logits_tools.float(), tools)
        if heads.value is not None:
            output.values = heads.value(state).squeeze(-1).float() * heads.value_std + heads.value_mean
            if values is not None:
                losses["value"] = heads.value_loss(output.values, values)
        if heads.plan is not None:
            output.plan = heads.plan.decode(state)
            if plan is not None:
                losses["plan"] = heads.plan.loss(state, plan)
        return losses

    def _gate_losses(self) -> dict[str, Tensor]:
        l1, l2 = self.config.gate_l1, self.config.gate_l2
        if not (l1 or l2):
            return {}
        assert isinstance(self.path, SidePath)
        return {"gates": self.path.aggregator.gate_penalty(l1, l2)}

    def _weight(self, name: str) -> float:
        return {"lm": self.config.lambda_lm, "plan": self.config.lambda_plan}.get(name, 1.0)


@dataclass
class _Seen:
    """Holds hidden states of the base, and states of the side path where they are known already."""

    hidden: Sequence[Tensor]
    states: Tensor | None = None


def attach(model: Any, config: ModelConfig | str | None = None, **options: Any) -> LFormer:
    """Attaches a side path and heads to a Hugging Face causal language model in place; it starts frozen (phase ``a``).

    With ``blend_into_lm`` the model itself, its ``generate`` too, then sees the state; as the gate starts at 0, its
    logits are at first what they were. Attach before DDP, FSDP2 or ``torch.compile``.

    Args:
        model: every architecture whose decoder returns its hidden states.
        config: of the side path, or its aggregator by name; sizes of the base in it are ignored.
        options: fields of `ModelConfig` that differ from it.

    Returns:
        The L-Former around the model; ``remove()`` takes it off again, ``save(folder)`` writes it for `load`.

    Raises:
        ValueError: the model is no causal language model or has a side path already; an option is wrong.

    Example::

        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=2)).eval()
        >>> model = attach(base, side_size=16, aggregator="gru").eval()
        >>> model(torch.arange(12).view(2, 6)).states.shape
        torch.Size([3, 2, 16])
    """
    return LFormer(resolve_config(ModelConfig, config, options, lambda name: ModelConfig(aggregator=name)), model)


def load(model: Any, folder: str | Path) -> LFormer:
    """Attaches a saved side path with its heads to a Hugging Face causal language model in place.

    Args:
        model: the one that it was made for, with the same weights. Layers that phase B trained are in the folder.
        folder: what ``save`` of the L-Former wrote.

    Returns:
        The L-Former around the model, as `attach` does.

    Raises:
        ValueError: files are missing or damaged, or were made for another model; ``model`` is then as it was.
    """
    return LFormer.load(model, folder)


def make_base(config: ModelConfig) -> Any:
    """Returns a GPT-2 with fresh parameters."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.max_length, n_embd=config.hidden_size,
            n_layer=config.num_layers, n_head=config.num_heads, n_inner=config.intermediate_size,
            resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout, bos_token_id=None,
            eos_token_id=None,
        )
    )  # fmt: skip


def _parts(base: Any) -> tuple[Any, nn.ModuleList]:
    """Returns the decoder of a causal language model, and its layers."""
    decoder = getattr(base, "base_model", None)
    if decoder is None or decoder is base or getattr(base, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(f"a side path is for Hugging Face's causal language models, got {type(base).__name__}")
    return decoder, layers_of(decoder)


def last_counted(states: Tensor, mask: Tensor | None) -> Tensor:
    """Selects of states per token ``[B, S, d]`` those of the last token that counts, ``[B, d]``."""
    if mask is None:
        return states[:, -1]
    position = mask.shape[1] - 1 - mask.int().flip(1).argmax(1)
    return states[torch.arange(len(mask), device=mask.device), position]
