"""Options as dataclasses: `option` makes a field with its help and its bounds, `LoopOptions` are those of the loop.

Metadata of the fields is the one source of what an option may be: `check_fields` checks it, `json_schema` tells it, and
`apply_overrides` reads ``--set key=value``. It also keeps the name that a field had in an earlier version, by which
`with_current_names` reads what that version wrote.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar, Literal, TypeVar

from xlayer_systems.errors import UserError

Settings = TypeVar("Settings")
Value = TypeVar("Value")
Loop = TypeVar("Loop", bound="LoopOptions")
MAX_SEED = 2**32 - 1  # what every generator takes
DTYPES = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # to Accelerate's names for mixed precision


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Iterable[str] | None = None,
    earlier: str | None = None,
) -> Any:
    """Makes a dataclass field for an option.

    Args:
        default: its value where nothing else is asked for.
        help: one line about it.
        minimum, maximum: bounds that the value may reach.
        above, below: bounds that it may not reach.
        choices: values of a string, as a ``Literal`` annotation has them.
        earlier: the field's name in an earlier version, whose files are read.
    """
    bounds = {"minimum": minimum, "maximum": maximum, "above": above, "below": below}
    metadata: dict[str, Any] = {name: bound for name, bound in bounds.items() if bound is not None}
    if choices is not None:
        metadata["choices"] = tuple(choices)
    if earlier is not None:
        metadata["earlier"] = earlier
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def redefault(parent: type, name: str, default: Any, help: str | None = None) -> Any:
    """Makes a field like the one of a parent dataclass, with another default and perhaps another help."""
    found = next(field for field in dataclasses.fields(parent) if field.name == name)
    metadata = {**found.metadata, **({} if help is None else {"help": help})}
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(settings: Any) -> None:
    """Checks every field of a dataclass that `option` made.

    Raises:
        ValueError: a value is of another type, not finite, out of bounds or no choice.
    """
    hints = _hints(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if "help" in field.metadata:
            expected = _violated(value, hints[field.name], field.metadata)
            if expected is not None:
                raise ValueError(f"{field.name} must be {expected}, got {value!r}")


def json_schema(settings: Any) -> dict[str, Any]:
    """Returns the JSON schema of a dataclass made of `option` fields; its defaults are the values of ``settings``."""
    hints = _hints(type(settings))
    properties = {}
    for field in dataclasses.fields(settings):
        if "help" in field.metadata:
            schema = _field_schema(hints[field.name], field.metadata)
            properties[field.name] = {
                **schema,
                "default": plain(settings)[field.name],
                "description": field.metadata["help"],
            }
    return {"type": "object", "additionalProperties": False, "properties": properties}


def plain(settings: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass as JSON and YAML hold them."""
    values = dataclasses.asdict(settings)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def earlier_names(kind: Any) -> dict[str, str]:
    """Returns the names of fields of the dataclass ``kind`` by the names that they had in an earlier version."""
    fields = dataclasses.fields(kind)
    return {field.metadata["earlier"]: field.name for field in fields if "earlier" in field.metadata}


def with_current_names(kind: Any, values: Mapping[str, Value]) -> dict[str, Value]:
    """Translates the names that fields of the dataclass ``kind`` had in an earlier version; others stay as they are.

    Raises:
        ValueError: a field is given by its earlier and by its present name.
    """
    values, renamed = dict(values), earlier_names(kind)
    for earlier, current in renamed.items():
        if earlier in values and current in values:
            raise ValueError(f"{current} is given twice, also by its earlier name {earlier}; expected one of them")
    return {renamed.get(name, name): value for name, value in values.items()}


_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
_BOUNDS = {"minimum": "minimum", "maximum": "maximum", "above": "exclusiveMinimum", "below": "exclusiveMaximum"}


def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _split_optional(hint: Any) -> tuple[Any, bool]:
    """Returns the type without None, and whether None is allowed; of several types the first counts."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        arguments = typing.get_args(hint)
        return next(a for a in arguments if a is not type(None)), type(None) in arguments
    return hint, False


def _choices(hint: Any, metadata: Mapping[str, Any]) -> tuple[Any, ...] | None:
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return metadata.get("choices")


def _field_schema(hint: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    kind, is_optional = _split_optional(hint)
    choices = _choices(kind, metadata)
    if choices is not None:
        return {"enum": [*choices, None] if is_optional else list(choices)}
    bounds = {_BOUNDS[name]: metadata[name] for name in _BOUNDS if name in metadata}
    if typing.get_origin(kind) is tuple:
        items = {"type": _TYPES[typing.get_args(kind)[0]], **bounds}
        return {"type": ["array", "null"] if is_optional else "array", "items": items}
    return {"type": [_TYPES[kind], "null"] if is_optional else _TYPES[kind], **bounds}


def _violated(value: Any, hint: Any, metadata: Mapping[str, Any]) -> str | None:
    """Returns what the value should be, or None where it is right."""
    kind, is_optional = _split_optional(hint)
    if value is None and is_optional:
        return None
    choices = _choices(kind, metadata)
    if choices is not None:
        return None if value in choices else f"one of {', '.join(map(str, choices))}"
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        violations = (_violated(item, inner, metadata) for item in value)
        return next((f"numbers, each {expected}" for expected in violations if expected is not None), None)
    if kind is str:
        return None if isinstance(value, str) else "a text"
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return "an integer" if kind is int else "a number"
    return None if _is_inside(value, metadata) else _range_words(kind, metadata)


def _is_inside(value: float, metadata: Mapping[str, Any]) -> bool:
    return (
        math.isfinite(value)
        and value >= metadata.get("minimum", value)
        and value <= metadata.get("maximum", value)
        and value > metadata.get("above", -math.inf)
        and value < metadata.get("below", math.inf)
    )


def _range_words(kind: type, metadata: Mapping[str, Any]) -> str:
    low, high, above, below = (metadata.get(name) for name in ("minimum", "maximum", "above", "below"))
    if low is not None and high is not None:
        return f"between {low} and {high}"
    if high is None and below is None and kind is float:
        if low == 0:
            return "finite and not negative"
        return f"finite and more than {above}" if above is not None else "finite"
    parts = [f"at least {low}"] if low is not None else []
    parts += [f"more than {above}"] if above is not None else []
    parts += [f"at most {high}"] if high is not None else []
    parts += [f"less than {below}"] if below is not None else []
    return " and ".join(parts)


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """Holds what every run of the shared loop has. A subclass per kind of training adds its rates and its defaults.

    Raises:
        ValueError: a value is out of range.
    """

    epochs: int = option(3, "passes over the training set", minimum=0)
    max_steps: int | None = option(None, "number of optimizer steps to end after, if that comes first", minimum=1)
    batch_size: int = option(
        8,
        "examples per optimizer step, over all processes and accumulation steps together, so that a run means the same "
        "on one CPU and on eight GPUs",
        minimum=1,
    )
    accumulate: int = option(1, "micro-batches per optimizer step and process", minimum=1)
    max_length: int = option(128, "tokens of an example", minimum=1)
    weight_decay: float = option(0.01, "AdamW's decay of matrices", minimum=0)
    warmup: float = option(
        0.1,
        "share of all steps in which the rate rises linearly; it falls linearly to 0 over the rest",
        minimum=0,
        maximum=1,
    )
    clip: float = option(1.0, "largest norm of the gradient", above=0)
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "bfloat16, float16: mixed precision")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass")
    stop_below: float | None = option(None, "stop after the first epoch when its validation accuracy is below this")
    eval_batch_size: int = option(64, "examples per evaluation batch and process", minimum=1)
    eval_every: int | None = option(
        None, "steps between evaluations, beside the one at the end of every epoch", minimum=1
    )
    log_every: int = option(20, "steps between lines of the training loss", minimum=1)
    checkpoint_every: int = option(
        200, "steps between checkpoints, beside the one at the end of every epoch", minimum=1
    )
    tensorboard: bool = option(True, "write event files for TensorBoard")

    unused_parameters: ClassVar[bool] = False  # whether steps may leave parameters without a gradient, for DDP

    def __post_init__(self) -> None:
        check_fields(self)

    def bounded(self: Loop, asked: Collection[str], given: Collection[str]) -> Loop:
        """Returns a copy in which bounds hold for every part of the run.

        The default has no other parts: a system with some lowers their sizes.

        Args:
            asked: names of the options that the user set; the bounds among them count.
            given: names of all options that are not defaults of the system, which stay as they are.
        """
        return self

    def _capped(self: Loop, given: Collection[str], **bounds: int) -> Loop:
        """Returns a copy with each option at most its bound, but those that were ``given``."""
        lower: dict[str, Any] = {}
        for name, bound in bounds.items():
            value = getattr(self, name)
            if name not in given and (value is None or value > bound):
                lower[name] = bound
        return dataclasses.replace(self, **lower)

    def micro_batch(self, processes: int) -> int:
        """Returns the examples per process and forward pass.

        Raises:
            UserError: the batch cannot be divided evenly.
        """
        parts = processes * self.accumulate
        if self.batch_size % parts:
            expected = f"a multiple of processes x accumulate = {processes} x {self.accumulate}"
            raise UserError(f"batch_size {self.batch_size} must be {expected}")
        return self.batch_size // parts


@dataclasses.dataclass(frozen=True)
class TrainOptions(LoopOptions):
    """Holds how to fine-tune an encoder. The defaults are the published ones for roberta-large on RTE."""

    encoder_lr: float = option(1.5e-5, "learning rate of the encoder", minimum=0)
    head_lr: float = option(3e-4, "learning rate of the head", minimum=0)
    bridge_lr: float | None = option(
        None,
        "learning rate of the parameters that a system adds; none gives them the encoder's, as published",
        minimum=0,
    )
    label_smoothing: float = option(0.05, "label smoothing of the cross-entropy", minimum=0, maximum=1)
    head_dropout: float = option(0.1, "dropout of the head", minimum=0, maximum=1)


@dataclasses.dataclass(frozen=True)
class LanguageModelOptions(LoopOptions):
    """Holds how to train a language model from random parameters."""

    epochs: int = redefault(LoopOptions, "epochs", 1)
    batch_size: int = redefault(LoopOptions, "batch_size", 32)
    max_length: int = redefault(LoopOptions, "max_length", 256, "tokens of a block; the model sees no further back")
    learning_rate: float = option(1e-3, "learning rate", minimum=0)
    weight_decay: float = redefault(LoopOptions, "weight_decay", 0.1)
    beta2: float = option(0.95, "AdamW's decay of the average of squared gradients", minimum=0, below=1)
    eval_batch_size: int = redefault(LoopOptions, "eval_batch_size", 32)
    eval_blocks: int | None = option(
        1024,
        "blocks of the validation text that evaluations during training use, evenly spaced; none: all",
        minimum=1,
    )
    eval_every: int | None = redefault(LoopOptions, "eval_every", 200)


def check_seed(seed: int) -> None:
    """Refuses a seed that some random generator would not take."""
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"a seed must be between 0 and {MAX_SEED}, got {seed}")


def parse_overrides(items: list[str]) -> dict[str, str]:
    """Parses ``["a=1", "b=x"]`` as a dict."""
    pairs = [item.partition("=") for item in items]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise UserError(f"expected key=value, got {key + equals!r}")
    return {key: value for key, _, value in pairs}


def apply_overrides(settings: Settings, overrides: Mapping[str, str]) -> Settings:
    """Returns a copy of the dataclass ``settings`` with ``overrides``, each parsed as its field's type."""
    hints = typing.get_type_hints(type(settings))
    values = {key: _parse(key, text, hints[key]) for key, text in overrides.items()}
    try:
        return dataclasses.replace(settings, **values)  # type: ignore[type-var]
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def current_overrides(overrides: Mapping[str, Value], *targets: Any) -> dict[str, Value]:
    """Translates earlier names of fields of the dataclasses ``targets``; one of them may be None.

    Raises:
        UserError: a field is given by two names.
    """
    found = dict(overrides)
    try:
        for target in targets:
            found = found if target is None else with_current_names(target, found)
    except ValueError as error:
        raise UserError(str(error)) from error
    return found


def split_overrides(overrides: Mapping[str, str], *targets: Any) -> list[dict[str, str]]:
    """Divides keys among the dataclasses ``targets``; an unknown key is refused with the known ones."""
    overrides = current_overrides(overrides, *targets)
    fields = [{f.name for f in dataclasses.fields(target)} if target is not None else set() for target in targets]
    for key in overrides:
        if not any(key in names for names in fields):
            known = sorted(set().union(*fields))
            hint = nearest(key, known)
            raise UserError(f"unknown setting {key!r}{hint}; expected one of {', '.join(known)}")
    return [{key: value for key, value in overrides.items() if key in names} for names in fields]


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the hint ``(did you mean …?)`` where a known name is close, else an empty text."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def _parse(key: str, text: str, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = {str(choice): choice for choice in typing.get_args(hint)}
        if text not in choices:
            raise UserError(f"unknown {key} {text!r}; expected one of {', '.join(choices)}")
        return choices[text]
    if origin in (types.UnionType, typing.Union):
        inner = [argument for argument in typing.get_args(hint) if argument is not type(None)]
        return None if text.lower() == "none" else _parse(key, text, inner[0])
    if origin is tuple:  # commas separate variants in a sweep
        return tuple(_parse(key, part, typing.get_args(hint)[0]) for part in text.replace("x", ",").split(","))
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{key} is true or false, got {text!r}")
        return text.lower() == "true"
    try:
        return hint(text)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key} takes a value of type {hint.__name__}, got {text!r}") from error
