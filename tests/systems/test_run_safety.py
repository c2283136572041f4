"""A run directory is data: hostile and damaged ones are refused in one line, and no run is lost or doubled."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from processes import join_processes
from run_tools import (
    EARLIER_FILES,
    ENVIRONMENT,
    FILES,
    Net,
    crash,
    make_trainer,
    refused,
    save_as_before,
    train,
)
from training_tools import Numbers, contents, read_metrics, run_xlayer, save_backbone, save_rte
from xlayer_systems.errors import InterruptionError
from xlayer_systems.training.checkpoints import TrainingState
from xlayer_systems.training.directory import RunDirectory
from xlayer_systems.training.options import TrainOptions
from xlayer_systems.training.trainer import Trainer, linear_schedule, make_accelerator

# ---- what a checkpoint holds -------------------------------------------------------------------------------------


def test_a_checkpoint_is_safetensors_and_json_and_gives_the_same_bits(tmp_path):
    expected = train(tmp_path / "whole")
    folder = crash(tmp_path / "cut")
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    for path in folder.iterdir():
        assert not zipfile.is_zipfile(path)
        if path.suffix == ".json":
            json.loads(path.read_text())
    found = train(tmp_path / "cut", resume=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_checkpoint_of_an_earlier_version_gives_the_same_bits(tmp_path, monkeypatch):
    expected = train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "save", save_as_before)
        folder = crash(tmp_path / "cut")
    assert {path.name for path in folder.iterdir()} >= set(EARLIER_FILES)
    found = train(tmp_path / "cut", resume=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


# ---- hostile files -----------------------------------------------------------------------------------------------


class Hostile:
    """An object that makes a directory when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def plant(path: Path, marker: Path, as_torch: bool) -> None:
    if as_torch:
        torch.save({"state": Hostile(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Hostile(marker)))


def test_the_hostile_object_works(tmp_path):
    plant(tmp_path / "file", tmp_path / "marker", as_torch=True)
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("as_torch", [False, True], ids=["pickle", "torch"])
@pytest.mark.parametrize("version", ["now", "earlier"])
def test_hostile_pickles_in_a_checkpoint_are_refused_and_not_executed(tmp_path, monkeypatch, version, as_torch):
    with monkeypatch.context() as patch:
        if version == "earlier":
            patch.setattr(TrainingState, "save", save_as_before)
        folder, marker = crash(tmp_path / "run"), tmp_path / "marker"
    for name in FILES if version == "now" else EARLIER_FILES:
        kept = (folder / name).read_bytes()
        plant(folder / name, marker, as_torch)
        before = contents(tmp_path / "run")
        refused(lambda: make_trainer(tmp_path / "run", resume=True), str(folder), name)
        assert not marker.exists() and contents(tmp_path / "run") == before
        (folder / name).write_bytes(kept)
    for name in (*EARLIER_FILES, "scheduler.bin", "custom_checkpoint_2.pkl", "scaler.pt"):
        if not (folder / name).exists() and not (version == "earlier" and name == "scaler.pt"):
            plant(folder / name, marker, as_torch)  # nobody asks for these
    train(tmp_path / "run", resume=True)
    assert not marker.exists()


# ---- damaged files -----------------------------------------------------------------------------------------------


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def change_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    for key, value in changes.items():
        inner = content["progress"] if key in content.get("progress", {}) else content
        inner[key] = value
    path.write_text(json.dumps(content))


def blank_line(run: Path) -> None:
    text = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(b"\0" * 20 + text[20:])


def link_metrics(run: Path) -> None:
    (run / "metrics.jsonl").rename(run.parent / "elsewhere")
    (run / "metrics.jsonl").symlink_to(run.parent / "elsewhere")


DAMAGES = {
    "metrics.jsonl short": (lambda run, point: cut(run / "metrics.jsonl"), "metrics.jsonl has"),
    "metrics.jsonl missing": (lambda run, point: (run / "metrics.jsonl").unlink(), "metrics.jsonl is missing"),
    "metrics.jsonl with NULs": (lambda run, point: blank_line(run), "line 1 of metrics.jsonl is no record"),
    "metrics.jsonl a link": (lambda run, point: link_metrics(run), "metrics.jsonl is no file"),
    "random states missing": (lambda run, point: (point / "random-0.json").unlink(), "random-0.json is missing"),
    "random states cut": (lambda run, point: cut(point / "random-0.json"), "random-0.json"),
    "random states empty": (lambda run, point: (point / "random-0.json").write_text("{}"), "random-0.json"),
    "model missing": (lambda run, point: (point / "model.safetensors").unlink(), "model.safetensors is missing"),
    "model cut": (lambda run, point: cut(point / "model.safetensors"), "model.safetensors"),
    "optimizer missing": (lambda run, point: (point / "optimizer.safetensors").unlink(), "optimizer.safetensors is"),
    "optimizer cut": (lambda run, point: cut(point / "optimizer.safetensors"), "optimizer.safetensors"),
    "model of another": (
        lambda run, point: shutil.copy(point / "optimizer.safetensors", point / "model.safetensors"),
        "unknown to this model",
    ),
    "state missing": (lambda run, point: (point / "checkpoint.json").unlink(), "checkpoint.json is missing"),
    "state cut": (lambda run, point: cut(point / "checkpoint.json"), "checkpoint.json"),
    "state empty": (lambda run, point: (point / "checkpoint.json").write_text("{}"), "checkpoint.json"),
    "later format": (lambda run, point: change_json(point / "checkpoint.json", format=9), "format 9"),
    "two processes": (lambda run, point: change_json(point / "checkpoint.json", processes=2), "2 process"),
    "negative step": (lambda run, point: change_json(point / "checkpoint.json", step=-1), "step of the progress"),
    "rates no numbers": (lambda run, point: change_json(point / "checkpoint.json", rates=["x"]), "numbers expected"),
    "no checkpoints": (lambda run, point: shutil.rmtree(run / "checkpoints"), "its folder checkpoints is missing"),
    "config empty": (lambda run, point: (run / "config.json").write_text("{}"), "config.json has no objects"),
    "config a list": (lambda run, point: (run / "config.json").write_text("[1]"), "config.json has no objects"),
    "config broken": (lambda run, point: (run / "config.json").write_text("{"), "readable config.json"),
    "result broken": (lambda run, point: (run / "result.json").write_text("{"), "result.json holds no result"),
    "written under FSDP before": (
        lambda run, point: ((point / "checkpoint.json").unlink(), (point / "pytorch_model_fsdp_0").mkdir()),
        "earlier version",
    ),
}


@pytest.fixture(scope="module")
def crashed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("crashed") / "run"
    crash(path)
    return path


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_refused_in_one_line_and_left_as_it_is(tmp_path, crashed, damage):
    run = tmp_path / "run"
    shutil.copytree(crashed, run)
    act, message = DAMAGES[damage]
    act(run, next((run / "checkpoints").iterdir()))
    before = contents(run)
    refused(lambda: make_trainer(run, resume=True), message)
    assert contents(run) == before


# ---- one process at a time -----------------------------------------------------------------------------------------


def test_a_run_is_held_by_one_process_until_it_ends_or_dies(tmp_path):
    first = RunDirectory(tmp_path / "run")
    first.create({}, ENVIRONMENT)
    second = RunDirectory(tmp_path / "run")
    refused(second.lock, "another process is at work in", str(tmp_path / "run"))
    refused(lambda: second.hold({}, ENVIRONMENT), "another process is at work in")
    first.close()
    second.lock()
    second.close()
    code = (
        "import sys, time; from pathlib import Path; from xlayer_systems.training.directory import RunDirectory; "
        "run = RunDirectory(Path(sys.argv[1])); run.lock(); print('held', flush=True); time.sleep(100)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    paths = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}) as child:
        assert child.stdout is not None and child.stdout.readline() == b"held\n"
        refused(second.lock, "another process is at work in")
        child.kill()
    second.lock()
    second.close()


def test_of_two_that_make_one_run_the_second_is_refused(tmp_path, monkeypatch):
    second, other = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    looks = iter([False, False, True])
    monkeypatch.setattr(second, "_check_new", lambda: RunDirectory._check_new(second) if next(looks) else None)
    other.create({"mine": 1}, ENVIRONMENT)
    before = contents(tmp_path)
    refused(lambda: second.create({}, ENVIRONMENT), "exists; choose another --run-dir")
    assert contents(tmp_path) == before


# ---- disks ---------------------------------------------------------------------------------------------------------


@contextmanager
def small_files(size: int):
    """Lets no file grow beyond ``size`` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path):
    from xlayer_systems.training.directory import disk_errors

    expected = train(tmp_path / "whole")
    folder = crash(tmp_path / "run")

    def go_on() -> None:
        with disk_errors(tmp_path / "run"), small_files(1500):
            train(tmp_path / "run", resume=True)

    refused(go_on, f"cannot write {tmp_path / 'run'}", "File too large")
    assert RunDirectory(tmp_path / "run").latest_checkpoint() == folder
    found = train(tmp_path / "run", resume=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")


# ---- many processes ------------------------------------------------------------------------------------------------


def whole_state(state: TrainingState) -> dict[str, torch.Tensor]:
    values = dict(state.accelerator.unwrap_model(state.model).state_dict())
    for index, entries in state.optimizer.state_dict()["state"].items():
        values |= {f"{index}.{name}": value for name, value in entries.items()}
    return {n: (v.full_tensor() if hasattr(v, "full_tensor") else v).clone() for n, v in values.items()}


def sharded_state(accelerator, steps: int) -> TrainingState:
    """Returns a training state under FSDP2, after some steps."""
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(Net(), mesh=dist.init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = linear_schedule(optimizer, 10, 0.1)
    for step in range(steps):
        model(torch.arange(4.0) + step + accelerator.process_index).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return TrainingState(accelerator, model, optimizer, schedule)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # asked for, though the processes have met
    join_processes(rank, folder)
    path, found = Path(folder), {}

    def trainer(name: str, resume: bool = False) -> Trainer:
        options = TrainOptions(epochs=2, batch_size=4, tensorboard=False, log_every=4, checkpoint_every=50)
        type(options).unused_parameters = True
        run, model = RunDirectory(path / name, rank == 0), Net()
        groups = [{"params": list(model.parameters()), "lr": 1e-2}]
        made = Trainer(make_accelerator(options), model, groups, Numbers(25), options, run, seed=0)
        assert made.accelerator.num_processes == 2
        dist.barrier()
        if resume:
            run.lock()
            made.resume()
        else:
            run.create({}, ENVIRONMENT)
        dist.barrier()
        return made

    whole = trainer("whole")
    whole.train()
    cut = trainer("cut")
    if rank == 1:  # it alone is told
        cut.model.module.on_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 1 else None
    try:
        cut.train()
    except InterruptionError as error:
        found["stopped"] = (cut.progress.step, error.exit_code)
    cut.run.close()
    again = trainer("cut", resume=True)
    again.train()
    found["ddp"] = [(whole_state(one.state), torch.get_rng_state()) for one in (whole, again)]

    accelerator = whole.accelerator
    state = sharded_state(accelerator, 3)
    torch.manual_seed(rank)
    if rank == 0:
        (path / "sharded").mkdir()
    dist.barrier()
    state.save(path / "sharded", {"step": 3})
    drawn = torch.rand(3)
    dist.barrier()
    fresh = sharded_state(accelerator, 0)
    assert fresh.load(path / "sharded") == {"step": 3}
    found["fsdp2"] = [whole_state(state), whole_state(fresh)]
    found["rates"] = [one.schedule.get_last_lr() for one in (state, fresh)]
    found["drawn"] = [drawn, torch.rand(3)]
    torch.save(found, path / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_agree_to_stop_and_resume_under_ddp_and_fsdp2(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    both = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for found in both:
        assert found["stopped"] == (4, 143)  # the next time that they logged
        (expected, _), (resumed, _) = found["ddp"]
        assert len(expected) > 20 and all(torch.equal(expected[name], resumed[name]) for name in expected)
        expected, loaded = found["fsdp2"]
        expected |= {name: both[0]["fsdp2"][0][name] for name in expected if "running" in name}  # the first process's
        assert expected.keys() == loaded.keys() and all(torch.equal(expected[n], loaded[n]) for n in expected)
        assert found["rates"][0] == found["rates"][1] and torch.equal(*found["drawn"])
    assert not torch.equal(both[0]["drawn"][0], both[1]["drawn"][0])  # each process has its own
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("places")
    places = ["--dataset", save_rte(folder / "rte"), "--backbone", save_backbone(folder / "backbone")]
    settings = ["--set", "encoder_lr=1e-3", "--set", "batch_size=8", "--set", "tensorboard=false", "--epochs", "1"]
    return ["train", "xlrb", "--preset", "plain", *places, *settings, "--run-dir"]


@pytest.fixture
def unfinished(tmp_path, command, monkeypatch, capsys) -> Path:
    """Makes a run with its model and its checkpoint, but without its result."""
    assert run_xlayer(monkeypatch, *command, tmp_path / "run") == 0
    capsys.readouterr()
    return tmp_path / "run"


def check_line(capsys, *parts: str, announced: bool = False) -> None:
    """Asserts that the command printed one error line alone, or with ``announced`` behind what it did until then."""
    captured = capsys.readouterr()
    assert announced or captured.err.count("\n") == 1, captured.err
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert captured.out == "" and "Traceback" not in captured.err and len(errors) == 1, captured.err
    assert captured.err.endswith(f"{errors[0]}\n") and all(part in errors[0] for part in parts), captured.err


def test_the_command_refuses_hostile_files_held_runs_and_divergence(tmp_path, command, unfinished, monkeypatch, capsys):
    run, marker = unfinished, tmp_path / "marker"
    for path in sorted((run / "model").iterdir()):
        kept = path.read_bytes()
        plant(path, marker, as_torch=False)
        assert run_xlayer(monkeypatch, "eval", run) == 2
        check_line(capsys, str(run / "model"), announced=True)
        path.write_bytes(kept)
    (run / "result.json").unlink()
    checkpoint = next((run / "checkpoints").iterdir())
    for path in [run / "config.json", run / "metrics.jsonl", run / "result.json", *sorted(checkpoint.iterdir())]:
        kept = path.read_bytes() if path.exists() else None
        plant(path, marker, as_torch=path.suffix == ".safetensors")
        assert run_xlayer(monkeypatch, *command, run, "--resume") == 2
        check_line(capsys, str(run))
        path.unlink() if kept is None else path.write_bytes(kept)
    with RunDirectory(run) as holder:
        holder.lock()
        before = contents(run)
        assert run_xlayer(monkeypatch, *command, run, "--resume") == 2
        check_line(capsys, "another process is at work in")
        assert contents(run) == before
    assert run_xlayer(monkeypatch, *command, run, "--resume") == 0
    assert not marker.exists()
    capsys.readouterr()
    assert run_xlayer(monkeypatch, *command, tmp_path / "far", "--set", "encoder_lr=1e30") == 3
    check_line(capsys, "diverged", announced=True)
    assert not (tmp_path / "far" / "result.json").exists()


@pytest.mark.parametrize("place", ["/dev/null/run", "/proc/run", "x" * 300])
def test_a_place_that_cannot_be_written_is_one_line(command, monkeypatch, capsys, place, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run_xlayer(monkeypatch, *command, place) == 2
    check_line(capsys, "cannot write")


def test_a_hostile_backbone_is_refused_and_not_executed(tmp_path, command, monkeypatch, capsys):
    backbone, marker = save_backbone(tmp_path / "backbone"), tmp_path / "marker"
    (backbone / "model.safetensors").unlink()
    capsys.readouterr()  # the progress bar of what was saved
    for as_torch in (False, True):
        plant(backbone / "pytorch_model.bin", marker, as_torch)
        assert run_xlayer(monkeypatch, *command, tmp_path / "run", "--backbone", backbone) == 2
        check_line(capsys, "cannot load backbone")
        assert not marker.exists()


def test_an_adapter_is_loaded_without_what_else_its_config_asks_for(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    from bypass_tools import make_ids, make_model, output
    from xlayer_systems.bypass import AdapterConfig
    from xlayer_systems.bypass.task import ADAPTER_FILE, ADAPTER_WEIGHTS, build_adapter, load_adapter

    adapter, marker = build_adapter(make_model("llama"), AdapterConfig(latent=8)), tmp_path / "marker"
    for name, parameter in adapter.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    adapter.save_pretrained(str(tmp_path / "model"))
    (tmp_path / "planted.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    change_json(tmp_path / "model" / ADAPTER_FILE, megatron_core="planted", megatron_config={"params_dtype": None})
    loaded = load_adapter(make_model("llama"), tmp_path / "model")
    assert torch.equal(output(loaded, make_ids()), output(adapter.eval(), make_ids()))
    plant(tmp_path / "model" / ADAPTER_WEIGHTS.replace(".safetensors", ".bin"), marker, as_torch=True)
    (tmp_path / "model" / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError):
        load_adapter(make_model("llama"), tmp_path / "model")
    assert not marker.exists()
