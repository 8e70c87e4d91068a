"""A sweep on a real Slurm: jobs that are preempted or requeued continue where they were, and the curves are the same.

Needs a Slurm that answers (a cluster's, or the one-node Slurm that NET2NET_SLURM/up starts and NET2NET_SLURM/down
stops; by default ../shared/slurm). Skips, and says why, where there is neither.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import TINY
from loops import pictures, read_rows

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]
Environment = dict[str, str]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """The environment in which Slurm's commands answer."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    if shutil.which("sinfo") and subprocess.run(["sinfo", "-h"], capture_output=True).stdout.strip():
        yield environment
        return
    scripts = Path(os.environ.get("NET2NET_SLURM", ROOT.parent / "shared" / "slurm"))
    if not (scripts / "up").exists():
        pytest.skip(f"no Slurm answers, and there is no {scripts / 'up'} that starts one")
    state = tmp_path_factory.mktemp("slurm")
    threads = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}  # nproc would obey it
    up = subprocess.run([scripts / "up", state], env=threads, capture_output=True, text=True)
    try:
        if up.returncode:
            said = (up.stderr or up.stdout).strip().splitlines() or ["nothing said"]
            pytest.skip(f"Slurm cannot be installed or started here: {said[-1]}")
        # Its last line is `export NAME=VALUE ... PATH=FOLDER:$PATH`.
        words = shlex.split(up.stdout.splitlines()[-1])[1:]
        changed = dict(word.split("=", 1) for word in words)
        yield environment | {key: value.replace("$PATH", os.environ["PATH"]) for key, value in changed.items()}
    finally:
        subprocess.run([scripts / "down", state], capture_output=True)


def wait(what: str, happened: Callable[[], object], driver: subprocess.Popen[str], seconds: float = 300) -> None:
    """Until it has happened; the test fails if it takes too long, or if the driver ends before."""
    for _ in range(round(seconds / 0.05)):
        if happened():
            return
        if driver.poll() is not None:
            pytest.fail(f"the sweep ended before {what}: {driver.communicate()[1][-3000:]}")
        time.sleep(0.05)
    pytest.fail(f"{what}: not within {seconds} s")


def test_a_preempted_and_a_requeued_job_continue_where_they_were(slurm, tmp_path):
    pictures(tmp_path / "tree")
    name = f"net2net-test-{os.getpid()}"
    command = [sys.executable, ROOT / "train.py", "-m", *TINY, "arms=net2net,random_pad,random_init"]
    command += ["schedule.epochs=60it", "schedule.evaluate=10it", "schedule.batch_size=16"]
    command += ["data=imagenet", f"data.root={tmp_path}/tree", "data.size=8", "data.workers=2", "data.holdout=0.1"]
    own = ["hydra.launcher.gpus_per_node=0", "hydra.launcher.cpus_per_task=1", f"hydra.launcher.name={name}"]

    def start(*settings: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([*command, *settings], cwd=tmp_path, env=slurm, text=True, stdout=pipe, stderr=pipe)

    def ask(*words: str | Path) -> str:
        return subprocess.run(words, env=slurm, capture_output=True, text=True, check=True).stdout.strip()

    def signal(task: int, *words: str) -> None:
        with suppress(subprocess.TimeoutExpired):  # scancel may repeat the signal until the job is back
            subprocess.run([*words, f"{number}_{task}"], env=slurm, check=True, timeout=5)

    def curve(arm: str, runs: str = "slurm") -> list[dict[str, str]]:
        folder = tmp_path / runs / "quickstart/seed0" / arm
        return read_rows(folder) if (folder / "curve.csv").exists() else []

    drivers = [start("hydra/launcher=slurm", *own, "runs=slurm")]
    try:
        # Two jobs want the teacher: one trains it, the other waits for it. The first is preempted, the second requeued.
        wait("rows of the teacher", lambda: len(curve("teacher")) > 1, drivers[0])
        number = ask("squeue", "-h", "-r", "-n", name, "-o", "%F").splitlines()[0]
        signal(0, "scancel", "--signal=USR2")
        assert len(curve("net2net")) < 7, "the job was done before it was signalled"
        wait("rows of random_pad", lambda: len(curve("random_pad")) > 1, drivers[0])
        signal(1, "scontrol", "requeue")
        assert len(curve("random_pad")) < 7, "the job was done before it was signalled"
        status = ask(sys.executable, ROOT / "scripts/status.py", tmp_path / "slurm")
        assert re.search(r"quickstart: .*(waiting|running)\n", status), status  # nothing has failed, or was stopped
        drivers += [start("runs=basic")]
        ends = [driver.communicate(timeout=500) for driver in drivers]
    finally:
        for driver in drivers:
            driver.kill()
        subprocess.run(["scancel", "-n", name], env=slurm)
    assert [driver.returncode for driver in drivers] == [0, 0], ends
    assert f"submitted Slurm job {number}: {number}_0, {number}_1, {number}_2\n" in ends[0][0]
    restarts = [ask("scontrol", "show", "job", f"{number}_{task}") for task in range(3)]
    assert [int(re.findall(r"Restarts=(\d+)", text)[0]) for text in restarts] == [1, 1, 0]
    assert len(list((tmp_path / "slurm/teachers").iterdir())) == 1
    for arm in ("teacher", "net2net", "random_pad", "random_init"):
        assert len(curve(arm)) == 7
        assert curve(arm) == curve(arm, "basic")
