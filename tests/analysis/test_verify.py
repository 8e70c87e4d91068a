"""Every committed curve is what its manifest says, and the check finds whatever is not."""

import functools
import json
import operator
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from net2net import certificate
from scripts import verify

ROOT = Path(__file__).resolve().parents[2]
try:
    HISTORY = verify.read_history()
except verify.ExperimentError:
    HISTORY = None
needs_history = pytest.mark.skipif(HISTORY is None, reason="a shallow clone or no checkout: there is no history")

PLACE = "curves/wider_inception/seed0/net2net"
TEACHER = "curves/wider_inception/seed0/teacher"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder of results with one committed curve and its teacher's, and their manifests."""
    for place in (PLACE, TEACHER):
        copy(place, tmp_path / place)
    return tmp_path


def copy(place: str, target: Path) -> None:
    """A committed curve and its manifest, under another name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".csv", ".json"):
        shutil.copy(ROOT / f"results/{place}{suffix}", f"{target}{suffix}")


def edit(place: Path, changes: dict[str, Any]) -> None:
    """Change what the manifest of a curve has at `processes.0.to`, for instance; a value with a + is appended."""
    path = place.with_suffix(".json")
    record = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, last = [int(part) if part.isdigit() else part for part in name.split(".")]
        owner = functools.reduce(operator.getitem, parents, record)
        owner[last] = owner[last] + value[1:] if str(value).startswith("+") else value
    path.write_text(json.dumps(record))


@needs_history
@pytest.mark.slow
def test_the_committed_curves_verify():
    assert list(verify.find_faults(ROOT / "results", HISTORY)) == []


# Places in the manifest, what to put there, and the fault that is found.
CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"dirty": True}, "made with uncommitted changes at "),
    ({"commit": "0" * 40}, "its commit 0000000000 is not in the history"),
    ({"processes.0.commit": "f" * 40}, "its commit ffffffffff is not in the history"),
    ({"processes": []}, "its processes made the steps [], its curve ends at 1404"),
    ({"processes.0.to": 700}, "its processes made the steps [(0, 700)], its curve ends at 1404"),
    ({"settings.rate": 1.0}, "rate is 0.1 by its configuration, 1.0 in its settings"),
    ({"settings.network.width": 2.0}, "network.width is 1.0 by its configuration, 2.0 in its settings"),
    ({"settings.teacher": "0" * 16}, "it started from another teacher than"),
    ({"student": None}, "its manifest is of net2net of seed 0"),
    ({"arm": "net"}, "its manifest is of net of wider of seed 0"),
    ({"config.arms": ["random_init"]}, "its manifest is of net2net of wider of seed 0"),
    ({"config.schedule.lr": 0.002}, "schedule.lr is 0.002 by its configuration, 0.001 in its settings"),
    ({"command": "+ schedule.epochs=9ep"}, "schedule.epochs is 9ep in its command, 4ep in its configuration"),
    ({"command": "+ seed=2,1"}, "seed is 2,1 in its command, 0 in its configuration"),
    ({"experiment": "another"}, "its manifest is of the experiment another"),
    ({"seed": 3}, "its manifest is of net2net of wider of seed 3"),
    ({"complete": False}, "says that the run was not finished"),
    ({"curve_sha256": "0" * 64}, "does not match curve_sha256"),
]


@needs_history
@pytest.mark.parametrize(("changes", "expected"), CHANGES, ids=[expected for _, expected in CHANGES])
def test_a_changed_manifest_is_found(copied, changes, expected):
    edit(copied / PLACE, changes)
    found = list(verify.find_faults(copied, HISTORY))
    assert all(fault.startswith(f"{PLACE}: ") for fault in found)
    assert any(expected in fault for fault in found)


def test_curves_in_the_place_of_others_are_found(copied):
    (copied / f"{PLACE}.csv").unlink()
    for source, experiment, arm, whose in (
        ("wider_inception/seed1/net2net", "wider_inception", "net2net", "wider of seed 1"),
        ("design_space/seed0/deeper_net2net", "design_space", "wider_net2net", "deeper of seed 0"),
        ("design_space/seed0/wider_net2net", "design_space", "deeper_net2net", "wider of seed 0"),
    ):
        place = f"curves/{experiment}/seed0/{arm}"
        copy(f"curves/{source}", copied / place)
        assert f"{place}: its manifest is of net2net of {whose}" in list(verify.find_faults(copied, None))


@needs_history
def test_what_lacks_its_company_is_found(copied):
    copy("curves/design_space/seed0/teacher", copied / TEACHER)
    (fault,) = verify.find_faults(copied, HISTORY)
    assert fault == f"{PLACE}: it started from another teacher than the one beside it"
    (copied / f"{TEACHER}.csv").unlink()
    assert set(verify.find_faults(copied, HISTORY)) == {
        f"{PLACE}: the teacher that it started from is missing",
        f"{TEACHER}: there is a manifest without its curve",
    }


REGISTERED = (
    "- {{claim: any words, source: ours, paper: none, measure: average, of: 'wider_inception:{of}',"
    " against: 'wider_inception:random_pad', above: {bound}, headline: true, registered: {registered}}}"
)


@needs_history
@pytest.mark.parametrize(
    ("of", "bound", "registered", "faults"),
    [
        ("net2net", "0", "true", 0),
        ("net2net", "0.5", "true", 1),
        ("net2net", "0.5", "false", 0),
        ("net2net", "0", "arm", 0),
        ("net2net", "0.5", "arm", 1),
        ("random_init", "0.5", "arm", 0),  # whose curves are not there
        ("random_init", "0.5", "true", 1),
    ],
)
def test_a_registered_claim_was_made_before_the_first_curve(copied, of, bound, registered, faults):
    (copied / "claims.yaml").write_text(REGISTERED.format(of=of, bound=bound, registered=registered))
    expected = [f"{PLACE}: 'any words' was not yet claimed at its commit"] * faults
    assert list(verify.find_faults(copied, HISTORY)) == expected


@needs_history
def test_seeds_of_other_settings_are_found(copied):
    for arm in ("net2net", "teacher"):
        copy(f"curves/wider_inception/seed1/{arm}", copied / f"curves/wider_inception/seed1/{arm}")
    assert list(verify.find_faults(copied, HISTORY)) == []
    changes = {"config.schedule.momentum": 0.5, "settings.schedule.momentum": 0.5}
    edit(copied / "curves/wider_inception/seed1/net2net", changes)
    assert f"{PLACE}: its seeds differ in `schedule.momentum` (0.9, 0.5)" in list(verify.find_faults(copied, HISTORY))


@needs_history
def test_a_changed_curve_is_found_and_ends_with_1(copied, capsys):
    assert verify.main(["--results", str(copied)]) == 0
    assert capsys.readouterr().out == "2 curves checked, 0 faults\n"
    curve = copied / f"{PLACE}.csv"
    last = curve.read_text().rstrip().rpartition(",")[2]
    curve.write_text(curve.read_text().replace(last, f"{float(last) + 0.1:.4f}"))
    assert verify.main(["--results", str(copied)]) == 1
    out, err = capsys.readouterr()
    assert out == "2 curves checked, 1 faults\n"
    assert err.startswith(f"{PLACE}: The curve ") and len(err.splitlines()) == 1
    assert verify.main(["--results", str(copied / "nothing")]) == 1


CERTIFICATE = {"operator": "wider", "settings": {}, "student": "b", "inputs": "c", "difference": {}, "layers": {}}


def certify(place: Path, teacher: str, **changes: Any) -> None:
    """Add a certificate to the manifest of a curve; `changes` are made behind its back."""
    content = {"format": 1, "teacher": teacher, "pinned": {}, **CERTIFICATE}
    path = place.with_suffix(".json")
    record = json.loads(path.read_text())
    record["certificate"] = content | {"sha256": certificate._digest_content(content)} | changes
    path.write_text(json.dumps(record))


def test_certificates_are_whole_and_name_one_teacher(copied):
    other = PLACE.replace("net2net", "random_pad")
    copy(other, copied / other)
    for place in (PLACE, other):
        certify(copied / place, "a")
    assert list(verify.find_faults(copied, None)) == []
    certify(copied / other, "another")
    assert list(verify.find_faults(copied, None)) == [
        f"{other}: its certificate names another teacher than that of an arm beside it"
    ]
    certify(copied / other, "a", student="another")
    (fault,) = verify.find_faults(copied, None)
    assert fault.startswith(f"{other}: The certificate was changed after it was written")


def test_a_growth_is_repeated_and_found_as_certified(finished, tmp_path, monkeypatch, capsys):
    for arm in ("net2net", "random_pad"):
        assert verify.main(["--growth", str(finished / arm)]) == 0
        assert capsys.readouterr().out.startswith("The teacher and the student are those of the certificate. Their ")
    assert verify.main(["--growth", str(finished / "random_init")]) == 1
    assert "There is no certificate in " in capsys.readouterr().err
    fill = verify.fill

    def fill_another(arm: str, *rest: Any) -> Any:
        return fill("random_pad" if arm == "net2net" else "net2net", *rest)

    monkeypatch.setattr(verify, "fill", fill_another)
    assert verify.main(["--growth", str(finished / "net2net")]) == 1
    assert capsys.readouterr().err.startswith("The student is another, or has been trained since")


def test_a_shallow_clone_is_told(copied, monkeypatch, capsys):
    monkeypatch.setattr(verify, "read_history", lambda: None)
    edit(copied / PLACE, {"commit": "0" * 40, "command": "+ seed=2,0,1"})
    assert verify.main(["--results", str(copied)]) == 0
    assert "This clone is shallow: commits are not checked." in capsys.readouterr().out


@needs_history
def test_history_is_that_of_this_checkout():
    head = subprocess.check_output(["git", "-C", ROOT, "rev-parse", "HEAD"], text=True).strip()
    assert HISTORY is not None and head in HISTORY
