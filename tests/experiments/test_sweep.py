"""Sweeps: the same curves whichever launcher runs them; a job that fails says why, and stops no other."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import submitit
import torture
from conftest import TINY, composed
from filelock import FileLock
from loops import error_of, read_rows
from omegaconf import OmegaConf

from experiments import command, files, sweep
from experiments.config import Config, ExperimentError
from experiments.signals import Interrupted

ROOT = Path(__file__).parents[2]


@pytest.mark.system
def test_the_local_launcher_makes_the_same_curves_and_a_failing_job_stops_no_other(tmp_path):
    small = [setting for setting in torture.SETTINGS if not setting.startswith(("arms", "target"))]
    small += ["schedule.epochs=12it", "schedule.evaluate=6it", "growth.calibrate=16"]
    small += ["arms=random_pad,net2net,random_init_low_lr", "rates.random_pad=1e30", "rates.random_init_low_lr=1e30"]
    # Sums are made in the order that the number of threads gives.
    places = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    ends = {}
    for launcher, more in {"basic": [], "local": ["hydra.launcher.n_jobs=2"]}.items():
        words = ["train.py", "-m", *small, f"hydra/launcher={launcher}", f"runs={tmp_path}/{launcher}", *more]
        ends[launcher] = subprocess.run([sys.executable, *words], **places, capture_output=True, text=True)
    for launcher, end in ends.items():
        assert end.returncode == 1
        assert end.stdout.count("test accuracy (%)") == end.stdout.count("\nfigure    ") == 1
        assert end.stdout.splitlines()[-1].startswith("verdict   net2net starts level with its teacher's end and ends ")
        said = [line for line in end.stderr.splitlines() if line.startswith("Error: ")]
        assert len(said) == 2, end.stderr
        for arm in ("random_pad", "random_init_low_lr"):
            (sentence,) = (line for line in said if f"quickstart seed0 {arm}: The loss is not finite" in line)
            failure = tmp_path / launcher / "quickstart/seed0" / arm / sweep.FAILURE
            assert f"Error: {failure.read_text()}" == f"{sentence}\n"
        for arm in ("teacher", "net2net"):
            run = tmp_path / launcher / "quickstart/seed0" / arm
            assert json.loads((run / "manifest.json").read_text())["complete"]
            assert not (run / sweep.FAILURE).exists()
            assert len(read_rows(run)) == 3 and read_rows(run) == read_rows(tmp_path / "basic/quickstart/seed0" / arm)
        # Whichever job came first trained the teacher, once; the other one waited for it.
        teacher = json.loads((tmp_path / launcher / "quickstart/seed0/teacher/manifest.json").read_text())
        assert [(process["from"], process["to"]) for process in teacher["processes"]] == [(0, 12)]
    manifest = json.loads((tmp_path / "local/quickstart/seed0/net2net/manifest.json").read_text())
    assert manifest["command"].startswith("python train.py ") and " arms=net2net" in manifest["command"]
    out = ends["local"].stdout
    log = tmp_path / "local/.multirun/logs/quickstart_seed0_net2net.txt"
    assert f"quickstart seed0 net2net: begun, log in {log}" in out
    assert "quickstart seed0 net2net: done" in out and "random_pad: done" not in out
    assert "step     12/12" in log.read_text() and "step     12/12" not in out


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Every run fails, the ones of seed 1 by a bug; gives the configurations that were to be run."""
    asked: list[Config] = []

    def fail(config: Config, *_: object, **__: object) -> None:
        asked.append(config)
        raise RuntimeError("a bug") if config.seed == 1 else ExperimentError("The images are gone.")

    monkeypatch.setattr("experiments.experiment.run_experiment", fail)
    return asked


def test_a_sweep_is_planned_and_what_failed_is_noted(train_py, failing, tmp_path, capsys):
    assert train_py("-m", "seed=0,1", "arms=net2net,random_init") == 1
    assert [(config.seed, config.arms) for config in failing] == [
        (seed, [arm]) for seed in (0, 1) for arm in ("net2net", "random_init")
    ]
    err = capsys.readouterr().err
    assert err.count("Error: quickstart seed0 net2net: The images are gone.") == 1
    assert err.count("Error: quickstart seed1 random_init: RuntimeError: a bug") == 1
    assert err.count("Traceback") == 2  # of the bug alone, once a job
    experiment = tmp_path / "runs/quickstart"
    arms = dict.fromkeys(["net2net", "random_init"], files.name_owner())
    assert sweep.read_plan(experiment) == {seed: arms for seed in ("0", "1")}
    notes = {path.relative_to(experiment).as_posix(): path.read_text() for path in experiment.rglob(sweep.FAILURE)}
    assert len(notes) == 4
    assert notes["seed1/net2net/failure.txt"] == "quickstart seed1 net2net: RuntimeError: a bug\n"
    assert set(sweep.read_failures()) == {text.strip() for text in notes.values()}


def test_the_plan_of_a_trial_stands_with_its_runs(train_py, failing):
    assert train_py("-m", "seed=1,2", "limit=150", "arms=random_init") == 1
    assert sweep.read_plan(Path("runs-limit150/quickstart")) == {
        seed: {"random_init": files.name_owner()} for seed in "12"
    }
    assert not Path("runs/quickstart").exists()


def test_a_new_sweep_adds_to_the_plan_and_forgets_the_failures_of_its_runs(train_py, failing, tmp_path, monkeypatch):
    train_py("-m", "seed=0,1", "arms=[net2net,random_init]")
    monkeypatch.setattr("experiments.experiment.run_experiment", lambda *_, **__: None)
    assert train_py("-m", "seed=1,2", "arms=net2net") == 0
    experiment = tmp_path / "runs/quickstart"
    both = ["net2net", "random_init"]
    assert {seed: list(arms) for seed, arms in sweep.read_plan(experiment).items()} == {
        "0": both,
        "1": both,
        "2": ["net2net"],
    }
    left = sorted(path.parent.relative_to(experiment).as_posix() for path in experiment.rglob(sweep.FAILURE))
    assert left == ["seed0/net2net", "seed0/random_init", "seed1/random_init"]


def test_sweeps_that_start_together_lose_nothing_of_the_plan(tmp_path, monkeypatch):
    config = OmegaConf.structured(composed(*TINY, f"runs={tmp_path}"))
    read = sweep.read_plan

    def slowly(experiment: Path) -> dict[str, dict[str, str]]:
        found = read(experiment)
        time.sleep(0.3)
        return found

    monkeypatch.setattr(sweep, "read_plan", slowly)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda seed: sweep.add_to_plan(config, {"seed": [seed]}), "012"))
    assert read(tmp_path / "quickstart").keys() == {"0", "1", "2"}


def test_jobs_of_slurm_say_their_numbers_and_where_to_look_before_they_are_waited_for(tmp_path, monkeypatch, capsys):
    class Executor:
        """What submitit does, without Slurm."""

        folder = str(tmp_path / "runs/.multirun/.submitit/%j")

        def map_array(self, function, *iterables):
            return [SimpleNamespace(job_id=f"41_{number}") for number in range(len(iterables[0]))]

    monkeypatch.setattr("submitit.AutoExecutor", Executor)
    monkeypatch.setattr(sweep, "planned", [])
    monkeypatch.setattr(sweep, "places", [])
    sweep.add_to_plan(OmegaConf.structured(composed(*TINY, f"runs={tmp_path}/runs")), {"seed": ["0", "1"]})
    with pytest.raises(Interrupted, match="Slurm job 41 goes on; scancel 41 ends it"), sweep.announce_jobs():
        submitit.AutoExecutor().map_array(print, [0, 1])
        said = capsys.readouterr().out.splitlines()
        raise KeyboardInterrupt  # while it waits
    assert said[0] == "submitted Slurm job 41: 41_0, 41_1"
    assert said[1] == f"look      python scripts/status.py {tmp_path}/runs   or   squeue -j 41"
    assert said[2] == f"logs      {tmp_path}/runs/.multirun/.submitit/41*/*_log.out"
    plan = sweep.read_plan(tmp_path / "runs/quickstart")
    assert plan.keys() == {"0", "1"} and {owner for arms in plan.values() for owner in arms.values()} == {
        "Slurm job 41"
    }
    assert submitit.AutoExecutor is Executor


def test_an_arm_that_another_run_writes_is_refused_and_in_a_sweep_left_out(train_py, tmp_path, capsys):
    folder = tmp_path / "runs/quickstart/seed0/random_init"
    with files.hold(folder):
        assert train_py("arms=[random_init]") == 1
        assert f"random_init is being written by process {os.getpid()} on " in error_of(capsys)
        assert train_py("-m", "arms=random_init") == 0
        out, err = capsys.readouterr()
        assert "random_init            skipped: runs/quickstart/seed0/random_init is being written by" in out
        assert err == "" and "figure    " not in out
        assert [path.name for path in folder.iterdir()] == [files.LOCK]  # no note, and nothing else


def test_a_sweep_over_experiments_knows_where_their_results_will_be(tmp_path):
    task = {"hydra": {"overrides": {"task": ["experiment=one,two", "seed=0,1"]}}}
    config = OmegaConf.merge(OmegaConf.create(asdict(composed(*TINY, f"runs={tmp_path}", "tag=new"))), task)
    sweep.Plan().on_multirun_start(config)
    assert sweep.places == [(tmp_path, "one-new"), (tmp_path, "two-new")] and not sweep.planned


def test_a_plan_names_the_cases_and_the_students(train_py, failing, tmp_path):
    cases = "+cases.two={students: {deeper: {layers: 2}}}"
    train_py("-m", "seed=0", cases, "+cases.other={arms: [random_init]}", "case=two,other")
    arms = ["net2net", "random_pad", "random_init", "random_init_low_lr"]
    expected = [f"{student}_{arm}" for student in ("wider", "deeper") for arm in arms]
    assert set(sweep.read_plan(tmp_path / "runs/quickstart/two")["0"]) == {*expected, "teacher_continued"}
    assert sweep.read_plan(tmp_path / "runs/quickstart/other").keys() == {"0"}
    assert [config.name for config in failing] == ["quickstart/two", "quickstart/other"]


def test_a_single_run_that_fails_at_once_leaves_nothing_and_later_it_leaves_why(train_py, failing, tmp_path):
    assert train_py() == 1
    assert not list(tmp_path.rglob(sweep.FAILURE))
    folder = tmp_path / "runs/quickstart/seed0/random_init"
    folder.mkdir(parents=True)  # it had begun
    assert train_py() == 1
    assert [path.parent for path in tmp_path.rglob(sweep.FAILURE)] == [folder]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("hydra/launcher=local",), "hydra/launcher=local starts the jobs of a sweep: add -m."),
        (("-m", "hydra/launcher=slurm"), "hydra/launcher=slurm needs Slurm's sbatch, which is not on this machine"),
        (("-m", "hydra/launcher=slrum"), "(did you mean 'slurm'?)"),
    ],
)
def test_a_launcher_that_cannot_be_used_is_refused_in_a_sentence(train_py, capsys, monkeypatch, typed, said):
    monkeypatch.setenv("PATH", "")
    assert train_py(*typed) == 1
    assert said in capsys.readouterr().err


def test_what_ends_a_job_is_told_from_process_to_process():
    stopped = pickle.loads(pickle.dumps(Interrupted(signal.SIGTERM, "net2net stopped at step 3 of 9")))
    assert (stopped.number, str(stopped)) == (signal.SIGTERM, "net2net stopped at step 3 of 9")
    failed = pickle.loads(pickle.dumps(command.JobFailed("seed0: The images are gone.", elsewhere=True)))
    assert (failed.sentence, failed.elsewhere) == ("seed0: The images are gone.", True)


def test_as_many_runs_at_once_as_gpus_or_else_as_cores(monkeypatch):
    monkeypatch.setattr("joblib.cpu_count", lambda: 12)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [sweep.runs_at_once(device) for device in ("auto", "cuda", "cpu", "cuda:1")] == [2, 2, 12, 1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert sweep.runs_at_once("auto") == 12


def test_each_process_takes_a_gpu_of_its_own_and_gives_it_back(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def take() -> tuple[str, list[FileLock]]:
        """What a process takes, and the lock that the kernel frees when the process ends."""
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
        monkeypatch.setattr(sweep, "_gpu_locks", [])
        sweep.take_gpu()
        sweep.take_gpu()  # it has one
        return os.environ["CUDA_VISIBLE_DEVICES"], sweep._gpu_locks

    (one, _), (two, (lock,)) = take(), take()
    assert (one, two) == ("3", "GPU-5")
    others = [take(), take()]
    assert [gpu for gpu, _ in others] == ["3", "GPU-5"]  # more processes than GPUs share them evenly
    lock.release()
    assert take()[0] == "GPU-5"
