"""The curve and the manifest of a run: what they say, and that anything else is refused by name."""

import hashlib
import json
import subprocess
from contextlib import suppress
from unittest.mock import MagicMock

import pytest

from experiments import checkpoint, run_log
from experiments.analysis.curves import load
from experiments.config import ExperimentError
from experiments.run_log import COLUMNS


def test_a_curve_has_the_columns_in_their_order(tmp_path):
    rows = [{"step": 0, "test_accuracy": 1 / 3, "flops": 123456789012}, {"step": 5, "seconds": 2.0}]
    run_log.write_curve(tmp_path, rows)
    lines = (tmp_path / "curve.csv").read_text().splitlines()
    assert lines[0].split(",") == list(COLUMNS)
    assert lines[1:] == ["0,,,,123456789012,,,,,,0.333333", "5,,,2,,,,,,,"]


def test_who_reads_while_another_writes_sees_whole_files(tmp_path, monkeypatch):
    def write(rows: list[dict[str, float]]) -> tuple[bytes, bytes]:
        with suppress(ExperimentError):
            run_log.write_curve(tmp_path, rows)
        with suppress(ExperimentError):
            run_log.write_manifest(tmp_path, {"rows": rows})
        return (tmp_path / "curve.csv").read_bytes(), (tmp_path / "manifest.json").read_bytes()

    first = write([{"step": 0}])
    monkeypatch.setattr("experiments.files.os.replace", MagicMock(side_effect=OSError(28, "No space left on device")))
    assert write([{"step": 0}, {"step": 5}]) == first  # nothing is there until it is moved into place, at once


@pytest.mark.parametrize("content", [b"", b"3", b'{"complete": true}', b"\xff\xfe\x00"])
def test_a_manifest_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ExperimentError, match=r"manifest\.json is no manifest \(.*\): remove its arm and run it again"):
        run_log.read_manifest(tmp_path / "manifest.json")


def test_new_modules_are_uncommitted_changes_and_without_git_nobody_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "__file__", str(tmp_path / "experiments/run_log.py"))
    assert run_log.describe_provenance()["commit"] == "" and run_log.describe_provenance()["dirty"] is None
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/a.py").write_text("")
    user = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), ("add", "."), (*user, "commit", "-qm", "a")):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/curve.csv").write_text("")
    assert run_log.describe_provenance()["dirty"] is False
    (tmp_path / "experiments/new.py").write_text("")
    assert run_log.describe_provenance()["dirty"] is True


ARMS = ["teacher", "net2net", "random_pad", "random_init", "teacher_continued", "random_init_low_lr"]


def test_a_finished_run_has_three_files_an_arm_and_a_record_where_it_grew(finished):
    assert sorted(path.name for path in finished.iterdir()) == sorted(ARMS)
    for arm in ARMS:
        assert sorted(path.name for path in (finished / arm).iterdir()) == [
            *["checkpoint.previous.pt"] * (arm == "teacher"),  # a damaged teacher need not be trained anew
            "checkpoint.pt",
            "curve.csv",
            *["growth.json"] * (arm in ("net2net", "random_pad")),
            "manifest.json",
        ]
    runs = load(finished.parent).runs  # which checks every curve against its manifest
    assert set(runs.index.get_level_values("arm")) == set(ARMS)


@pytest.mark.parametrize("arm", ARMS)
def test_the_manifest_of_a_finished_arm(finished, arm):
    manifest = json.loads((finished / arm / "manifest.json").read_text())
    assert manifest["complete"] is True
    assert manifest["experiment"] == "quickstart" and manifest["arm"] == arm and manifest["seed"] == 0
    assert manifest["student"] == (None if arm in ("teacher", "teacher_continued") else "wider")
    assert manifest["teacher"] == ("teacher" if arm in ("net2net", "random_pad", "teacher_continued") else None)
    curve = (finished / arm / "curve.csv").read_bytes()
    assert manifest["curve_sha256"] == hashlib.sha256(curve).hexdigest()
    assert manifest["device"] == "cpu" and manifest["precision"] == "float32" and manifest["hardware"]
    assert set(manifest) >= {"commit", "dirty", "versions", "command", "data"}
    state = checkpoint.load(finished / arm)
    weights = [v for k, v in state["network"].items() if not k.endswith(("running_mean", "running_var", "tracked"))]
    assert manifest["parameters"] == sum(v.numel() for v in weights)
    assert 2.8 < manifest["train_flops_per_image"] / manifest["forward_flops"] <= 3
    assert state["step"] == 20
    assert ("step0" in manifest) == (arm == "net2net")
    assert ("certificate" in manifest) == (arm in ("net2net", "random_pad"))
    ((process),) = manifest["processes"]
    assert (process["from"], process["to"], process["commit"]) == (0, 20, manifest["commit"])
    assert all(process[key] == manifest[key] for key in ("hardware", "device", "versions", "command"))
    last = curve.decode().splitlines()[-1].split(",")
    assert int(last[4]) == 20 * 32 * manifest["train_flops_per_image"]
