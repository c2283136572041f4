"""The ``xlayer`` command."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

import typer

from xlayer_systems.cli.runs import as_overrides, backbone_part, own_flags, run_name, run_of
from xlayer_systems.errors import CommandError, InterruptionError, UserError

# typer may vendor click; of its classes, BadParameter is a UsageError is a ClickException.
ClickException: type[Exception] = typer.BadParameter.__mro__[2]
INTERRUPTED = 130
SYSTEM_COMMANDS = {"train", "sweep", "profile", "options"}  # whose help and flags are those of the systems

HELP = """Train and compare systems for cross-layer communication in transformers.

**First steps** (no download; two CPU cores are enough):

    xlayer train xlrb --preset H9 --quick

    xlayer sweep xlrb --presets plain,H9,A3,A8 --seeds 0,1,2 --quick

    xlayer eval runs/xlrb-H9-stdlib-topics-seed0-quick

    xlayer train hyper_lm --residual dhc --quick

    xlayer eval runs/hyper_lm-dhc-stdlib-lm-seed0-quick --prompt "def "

    xlayer sweep hyper_lm --residual plain,shc,dhc,mhc --seeds 0,1,2 --quick

    xlayer train telepathy --quick

    xlayer sweep telepathy --soft-tokens 4,8,16,32,64,128 --seeds 0,1,2 --quick

    xlayer train bypass --quick

    xlayer train lformer --quick

    xlayer sweep lformer --presets ema,gru,attn --seeds 0,1,2 --quick

**Real data and backbones** are named in the same place:

    xlayer train xlrb --preset H9 --dataset glue/rte --backbone roberta-large --set dtype=bfloat16

    xlayer train hyper_lm --residual dhc --dataset wikitext/wikitext-2-raw-v1 --backbone small --set dtype=bfloat16

    xlayer train telepathy --dataset glue/sst2 --backbone meta-llama/Llama-3.1-8B,mistralai/Mistral-7B-v0.3

**Many GPUs**: `accelerate launch -m xlayer_systems.cli train xlrb --preset H9 ...`

Wrong input gives one line that starts with `error:` and exit code 2; a run that diverges ends with exit code 3. Ctrl-C
and SIGTERM end a run after a checkpoint, with exit code 130 and 143; a second Ctrl-C ends it at once."""

System = Annotated[str, typer.Argument(help="What to train.")]
Dataset = Annotated[str | None, typer.Option("--dataset", help="Training and validation data.")]
Backbone = Annotated[str | None, typer.Option("--backbone", help="What training starts from.")]
Preset = Annotated[str | None, typer.Option("--preset", "--residual", help="A named configuration.")]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Initial parameters, order of the examples, dropout; 0 by default.")
]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the training set.")]
Quick = Annotated[bool, typer.Option("--quick", help="Settings that train in a minute or two on two CPU cores.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a training option or a field of the config; repeatable. `--set help` lists the keys with their "
        "defaults and what they mean, as `xlayer options SYSTEM` does.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run from its last checkpoint.")]


def train(
    system: Annotated[str | None, typer.Argument(help="What to train; a run file may name it instead.")] = None,
    preset: Preset = None,
    dataset: Dataset = None,
    backbone: Backbone = None,
    seed: Seed = None,
    epochs: Epochs = None,
    quick: Quick = False,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="A YAML file with any of these options by name, and any that --set takes; the command line wins.",
        ),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="A new directory; by default runs/<what is trained>.")
    ] = None,
    resume: Resume = False,
    settings: Settings = None,
    **flags: str | None,
) -> None:
    """Train one preset with one seed and report its accuracy with a 95 % interval, or its loss.

    Examples:

        xlayer train xlrb --preset plain --quick

        xlayer train xlrb --preset H9 --set top_k=2 --set router_weight=full_softmax

        xlayer train xlrb --preset H9 --run-dir runs/mine --resume    (the same options as before)

        xlayer train hyper_lm --residual dhc --streams 2 --quick --set max_steps=400

        xlayer train telepathy --bridge fsq --soft-tokens 16 --dataset passkey --quick

        xlayer train --config runs/mine/run.yaml --run-dir runs/again    (every run directory holds its run.yaml)
    """
    from xlayer_systems.runs.execute import format_result, train_run
    from xlayer_systems.training.directory import RunDirectory
    from xlayer_systems.training.options import parse_overrides

    if _lists_settings(system, preset, quick, settings):
        return
    command: dict[str, Any] = {
        "system": system, "preset": preset, "dataset": dataset, "backbone": backbone, "seed": seed, "epochs": epochs,
        "quick": quick or None, "run_dir": run_dir, "resume": resume or None,
    }  # fmt: skip
    overrides = parse_overrides(settings or [])
    chosen, spec, given = run_of(command, flags, overrides, config)
    path = Path(given["run_dir"] or Path("runs") / run_name(chosen, spec, bool(given["quick"])))
    if given["resume"] and path.exists():
        # One that an earlier version began, which bounded the training loop alone, goes on as it began.
        unbounded = run_of(command, flags, overrides, config, bounded=False)[1]
        if unbounded != spec and chosen.read_spec(RunDirectory(path).read_config()["run"]) == unbounded:
            spec = unbounded
    _announce()
    result = train_run(chosen, spec, path, bool(given["resume"]))
    if _is_main_process():
        print(format_result(chosen, result))
        total = result.get("total_seconds", result["seconds"])  # runs of earlier versions have no total
        own = f", {result['seconds']:.0f} s of them until {spec.preset} was trained"
        print(f"run directory: {path}  ({total:.0f} s{own if chosen.has_own_training(spec) else ''})")


def sweep(
    system: System,
    presets: Annotated[
        str | None,
        typer.Option(
            "--presets",
            "--residual",
            help="Separated by commas; each may carry overrides: H9:router_weight=full_softmax:top_k=2, "
            "dhc:expansion_rate=2. By default plain, where the system has it, and the system's own default.",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = "0",
    dataset: Dataset = None,
    backbone: Backbone = None,
    epochs: Epochs = None,
    quick: Quick = False,
    out: Annotated[Path | None, typer.Option(help="A new directory; by default runs/sweep-<system>-<dataset>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep finished runs and continue the others.")] = False,
    settings: Settings = None,
    **flags: str | None,
) -> None:
    """Train several presets with several seeds and print a table.

    Per preset: mean accuracy on the whole validation set and its 95 % interval (Wilson for one seed, Student's t over
    seeds for more), parameters, seconds. For language models: validation loss with its interval over seeds, and how
    many tokens it took to the final loss of plain. Writes results.json, report.md, curves and what the layers did as
    PNG, and one run directory per preset and seed.

    Examples:

        xlayer sweep xlrb --presets plain,H9,A3,A8 --seeds 0,1,2 --quick

        xlayer sweep xlrb --presets H9,H9:router_weight=full_softmax,H9:gate_position=after_norm --seeds 0,1,2,3,4

        xlayer sweep hyper_lm --residual plain,shc,dhc,mhc --seeds 0,1,2 --quick

        xlayer sweep telepathy --bridge continuous,vq,fsq,dit --seeds 0,1,2 --quick

        xlayer sweep telepathy --presets classification,classification:threshold_ema_dead_code=1 --bridge vq --quick
    """
    from xlayer_systems.registry import get_system
    from xlayer_systems.runs.sweep import cross_variants, parse_seeds, parse_variants, run_sweep
    from xlayer_systems.runs.system import PLAIN
    from xlayer_systems.training.options import parse_overrides

    if _lists_settings(system, None, quick, settings):
        return
    chosen = get_system(system)
    own = own_flags(chosen, flags)
    swept = {chosen.flags[name]: own.pop(chosen.flags[name], None) for name in chosen.swept_flags}
    common = {**chosen.sweep_defaults, **as_overrides(epochs=epochs), **own, **parse_overrides(settings or [])}
    default = f"{PLAIN},{chosen.default_preset}" if PLAIN in chosen.presets() else chosen.default_preset
    variants = cross_variants(parse_variants(default if presets is None else presets), **swept)
    numbers = parse_seeds(seeds)
    specs = {
        variant.name: [
            chosen.make_spec(
                variant.preset,
                dataset=dataset,
                backbone=backbone,
                seed=seed,
                quick=quick,
                overrides={**common, **variant.overrides},
            )
            for seed in numbers
        ]
        for variant in variants
    }
    name = (dataset or chosen.default_dataset).replace("/", "-")
    part = backbone_part(chosen, backbone or chosen.default_backbone)
    path = out or Path("runs") / f"sweep-{system}-{part}{name}{'-quick' * quick}"
    _announce()
    summary = run_sweep(chosen, specs, path, resume)
    if _is_main_process():
        print(chosen.format_sweep(summary))
        print(f"sweep directory: {path}")


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run directory of a finished run.")],
    prompt: Annotated[str | None, typer.Option(help="Language models: continue this text instead.")] = None,
    tokens: Annotated[int, typer.Option(help="With --prompt: the maximum number of new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="With --prompt: 0 always takes the most likely token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="With --prompt: sample from the k most likely tokens.")] = None,
    seed: Annotated[int, typer.Option(help="With --prompt: of the draws.")] = 0,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Number of validation examples or blocks, evenly spaced; by default the whole set."),
    ] = None,
) -> None:
    """Evaluate the model of a finished run on the whole validation set, or let a language model continue a prompt.

    Limits of the run itself, such as eval_blocks, do not count here; --limit does.

    Examples:

        xlayer eval runs/xlrb-H9-stdlib-topics-seed0-quick

        xlayer eval runs/xlrb-H9-stdlib-topics-seed0-quick --limit 200

        xlayer eval runs/hyper_lm-dhc-stdlib-lm-seed0-quick --prompt "def " --temperature 0.8 --top-k 40
    """
    from xlayer_systems.registry import open_run
    from xlayer_systems.runs.execute import complete_text, evaluate_run, format_result

    system, spec = open_run(run)
    if prompt is not None:
        print(complete_text(system, spec, run, prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed))
        return
    _announce()
    result = evaluate_run(system, spec, run, limit)
    if _is_main_process():
        print(format_result(system, result))


def profile(
    system: System,
    preset: Preset = None,
    dataset: Dataset = None,
    backbone: Backbone = None,
    seed: Seed = None,
    quick: Quick = False,
    steps: Annotated[int, typer.Option(help="Optimizer steps to measure.")] = 5,
    warmup: Annotated[int, typer.Option(help="Steps before them.")] = 3,
    tool: Annotated[
        str,
        typer.Option(
            help="torch (a Chrome trace), nsys (Nsight Systems) or ncu (Nsight Compute). auto, the default: nsys and "
            "ncu where there are a GPU, the tools and the package nvtx, else torch."
        ),
    ] = "auto",
    run_dir: Annotated[Path | None, typer.Option(help="A new directory; by default runs/profile-<what runs>.")] = None,
    settings: Settings = None,
    **flags: str | None,
) -> None:
    """Show where the time of a few training steps and an evaluation goes.

    A table of the loop's phases, the longest kernels (on the CPU: operators) with bandwidth and occupancy, the modules,
    and the share of time in which the device was at work; and the trace or the reports, to look closer.

    Examples:

        xlayer profile xlrb --quick

        xlayer profile hyper_lm --residual dhc --backbone small --set dtype=bfloat16 --tool nsys
    """
    if _lists_settings(system, preset, quick, settings):
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler logs its start and stop
    from xlayer_systems.profiling.command import profile_run
    from xlayer_systems.registry import get_system
    from xlayer_systems.training.options import parse_overrides

    chosen = get_system(system)
    overrides = {**own_flags(chosen, flags), **parse_overrides(settings or [])}
    spec = chosen.make_spec(
        preset, dataset=dataset, backbone=backbone, seed=seed or 0, quick=quick, overrides=overrides
    )
    path = run_dir or Path("runs") / f"profile-{run_name(chosen, spec, quick)}"
    print("\n".join(profile_run(chosen, spec, path, steps=steps, warmup=warmup, tool=tool)))
    print(f"run directory: {path}")


def options(
    system: Annotated[str | None, typer.Argument(help="Whose options to list; without it, the systems.")] = None,
    preset: Preset = None,
    quick: Quick = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON schema instead of a table.")] = False,
) -> None:
    """List every option of a system with its type, bounds, default and meaning, and what its presets change.

    Each can be given as `--set KEY=VALUE` to `xlayer train`, `sweep` and `profile`, or in a run file.

    Examples:

        xlayer options

        xlayer options xlrb

        xlayer options bypass --preset lora --json
    """
    import json

    from xlayer_systems.registry import SYSTEMS, get_system
    from xlayer_systems.reporting.options import format_schema

    if system is None:
        print("\n".join(f"{name:<10} {found.summary}" for name, found in SYSTEMS.items()))
        print("\n`xlayer options SYSTEM` lists the options of one.")
        return
    schema = get_system(system).schema(preset, quick)
    print(json.dumps(schema, indent=2, ensure_ascii=False) if as_json else format_schema(schema))


def info(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="List the CUDA kernels with registers, shared memory and occupancy.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all facts as JSON.")] = False,
) -> None:
    """Print what was built, what is in use on this machine and why (the same as `python -m xlayer_ext.info`)."""
    from xlayer_ext.info import main as print_info

    print_info([name for name, given in (("--kernels", kernels), ("--json", as_json)) if given])


def encoder(
    out: Annotated[Path, typer.Argument(help="A new directory: run files, and the encoder itself in its encoder/.")],
    epochs: Epochs = None,
    contrast: Annotated[float, typer.Option(help="Weight of the contrastive loss; 0 leaves masked tokens only.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Parameters, pairs, masks.")] = 0,
    resume: Resume = False,
    settings: Settings = None,
) -> None:
    """Pretrain the small encoder (1.7 M parameters) on the Python standard library's training files.

    Masked-token prediction and in-batch contrast of passages that belong together. Validation files are never read.

    Example:

        xlayer pretrain encoder runs/encoder && xlayer train xlrb --backbone runs/encoder/encoder --quick
    """
    from xlayer_systems.registry import PRETRAINING
    from xlayer_systems.runs.execute import format_result, train_run
    from xlayer_systems.training.options import parse_overrides

    system = PRETRAINING["encoder"]
    overrides = {**as_overrides(epochs=epochs), **parse_overrides(settings or [])}
    spec = system.make_spec(seed=seed, overrides=overrides, config={"contrast": str(contrast)})
    _announce()
    result = train_run(system, spec, out, resume)
    if _is_main_process():
        print(format_result(system, result))
        print(f"encoder: {out / 'encoder'}")


def decoder(
    out: Annotated[Path, typer.Argument(help="A new directory: run files, and the decoder itself in its decoder/.")],
    shape: Annotated[str, typer.Option(help="sender or receiver: they differ in tokenizer and width.")] = "sender",
    seed: Annotated[int, typer.Option(help="Parameters, order of documents and blocks.")] = 0,
    resume: Resume = False,
    settings: Settings = None,
) -> None:
    """Pretrain one of the two small decoders on the Python standard library's training files.

    Next-token prediction on source files and docstrings. Nothing is learned from validation files.

    Example:

        xlayer pretrain decoder runs/sender --shape sender
    """
    from xlayer_systems.registry import PRETRAINING
    from xlayer_systems.runs.execute import format_result, train_run
    from xlayer_systems.training.options import parse_overrides

    system = PRETRAINING["decoder"]
    spec = system.make_spec(shape, seed=seed, overrides=parse_overrides(settings or []))
    _announce()
    result = train_run(system, spec, out, resume)
    if _is_main_process():
        print(format_result(system, result))
        print(f"decoder: {out / 'decoder'}")


def _print_version(wanted: bool) -> None:
    if wanted:
        import xlayer_ext

        print(f"xlayer-ext {xlayer_ext.__version__}")
        raise typer.Exit()


def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _lists_settings(system: str | None, preset: str | None, quick: bool, settings: list[str] | None) -> bool:
    """Lists the options of a system where they are asked for by ``--set help``."""
    if "help" not in (settings or []):
        return False
    options(system, preset, quick)
    return True


@lru_cache(maxsize=2)
def make_app(with_systems: bool = True) -> typer.Typer:
    """Makes the command line.

    Args:
        with_systems: with the help and the flags of the systems in the registry, whose import takes seconds.
    """
    systems: Mapping[str, Any] = {}
    if with_systems:
        from xlayer_systems.registry import SYSTEMS

        systems = SYSTEMS
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        help=HELP,
    )
    app.callback()(_program)
    for command in (train, sweep, profile, options):
        app.command()(_with_systems(command, systems))
    app.command(name="eval")(evaluate)
    app.command()(info)
    pretrain = typer.Typer(no_args_is_help=True, help="Make the small backbone that the other commands start from.")
    pretrain.command()(encoder)
    pretrain.command()(decoder)
    app.add_typer(pretrain, name="pretrain")
    return app


def _with_systems(command: Callable[..., None], systems: Mapping[str, Any]) -> Callable[..., None]:
    """Gives a command the help of the systems, and their own flags in place of its ``**flags``."""
    help_of = {
        "system": "What to train: " + ", ".join(f"{name} ({s.summary})" for name, s in systems.items()) + ".",
        "preset": _told({n: f"{s.preset_help} (default {s.default_preset})" for n, s in systems.items()}),
        "dataset": _told({n: f"{s.dataset_help} (default {s.default_dataset})" for n, s in systems.items()}),
        "backbone": _told({n: f"{s.backbone_help} (default {s.default_backbone})" for n, s in systems.items()}),
    }
    signature = inspect.signature(command, eval_str=True)
    parameters = []
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            parameters += _flag_parameters(systems)
            continue
        if systems and parameter.name in help_of:
            kind, info = get_args(parameter.annotation)
            info = copy.copy(info)
            info.help = help_of[parameter.name]
            parameter = parameter.replace(annotation=Annotated[kind, info])
        parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(command)
    def wrapped(**arguments: Any) -> None:
        command(**arguments)

    del wrapped.__wrapped__  # else its signature would be read
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return wrapped


def _flag_parameters(systems: Mapping[str, Any]) -> list[inspect.Parameter]:
    """Returns a parameter for every flag of a system, with the help of the option that it sets."""
    found: dict[str, list[str]] = {}
    for name, system in systems.items():
        sections = system.schema()["properties"]
        properties = {**sections["options"]["properties"], **sections["config"].get("properties", {})}
        for flag, key in system.flags.items():
            several = "; in a sweep several, with commas" if flag in system.swept_flags else ""
            told = f"{properties[key]['description']} (default {properties[key]['default']}{several})"
            found.setdefault(flag, []).append(f"{name}: {told}.")
    return [
        inspect.Parameter(
            flag.replace("-", "_"),
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[str | None, typer.Option(f"--{flag}", help=" ".join(lines))],
        )
        for flag, lines in found.items()
    ]


def _told(by_system: Mapping[str, str]) -> str:
    return " ".join(f"{name}: {text}." for name, text in by_system.items())


def main() -> None:
    """Runs the command; an error that the user can mend ends in one line on stderr and the exit code of its
    `CommandError`."""
    # Before torch loads its OpenMP: threads that spin while they wait make a step on a busy machine ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = make_app(with_systems=bool(SYSTEM_COMMANDS.intersection(sys.argv)))(standalone_mode=False)
        if code == INTERRUPTED:  # outside the training loop, which raises its own error
            raise InterruptionError("interrupted", INTERRUPTED - 128)
    except CommandError as error:
        _fail(error)
    except ClickException as error:
        message = error.format_message()  # type: ignore[attr-defined]
        if message:
            _fail(UserError(message))
        error.show()  # type: ignore[attr-defined]  # a command without arguments shows its help
        sys.exit(UserError.exit_code)


def _fail(error: CommandError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


class _Announcements(logging.Handler):
    """Prints what the systems log to stderr, as stdout is for results."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        print(f"{prefix}{record.getMessage()}", file=sys.stderr, flush=True)


def _announce() -> None:
    """Shows the progress of a run on stderr, from the main process alone."""
    log = logging.getLogger("xlayer_systems")
    log.handlers = [_Announcements() if _is_main_process() else logging.NullHandler()]
    log.setLevel(logging.INFO)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
