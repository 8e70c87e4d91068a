"""Claims: their verdicts on curves made up for the purpose, and that the committed ones name what exists."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import cases
from pandas import DataFrame, Series
from simulated import Runs, make_curve, make_frontier, make_runs

from experiments.analysis import cases as analysis_cases
from experiments.analysis import claims, curves, pages
from experiments.analysis.claims import Claim, Finding, read_claims
from experiments.analysis.curves import make_results
from experiments.analysis.statistics import HEADLINE_SEEDS, Estimate
from experiments.config import ExperimentError, split_arm

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = read_claims(ROOT / "results/claims.yaml")


def judge(runs: Runs, measure: str, of: str, against: str = "", **region: Any) -> Finding:
    """The verdict of these runs on a claim, by default that the measure is above 0."""
    claim = Claim("c", "s", "p", measure, of, against, **(region or {"above": 0}))
    return claims.judge(claim, make_results((*key, *run) for key, run in runs.items()))


# Seeds differ by ten points and arms by one, always: unpaired, nothing could be said.
BETTER, WORSE = [[0, 0.61], [0, 0.71], [0, 0.81]], [[0, 0.60], [0, 0.70], [0, 0.80]]
GOOD, LOW = [[0, 0.6 + i / 1000] for i in range(4)], [[0, 0.5]] * 4
TIE = [[0, 0.6, 0.6]] * 3
SCRATCH = [[0.1, 0.5, 0.6, 0.7]] * 3
FAST, NEVER = [0.5, 0.7, 0.7, 0.8], [0.5, 0.6, 0.6, 0.65]


@pytest.mark.parametrize(
    ("of", "against", "measure", "region", "verdict", "value"),
    [
        (BETTER, WORSE, "final", {"above": 0}, "holds", "+1.00 points (+1.00 to +1.00), n = 3"),
        (WORSE, BETTER, "final", {"above": 0}, "fails", "-1.00"),
        (WORSE, BETTER, "final", {"within": 1.5}, "holds", "-1.00"),
        (WORSE, BETTER, "final", {"within": 0.5}, "fails", "-1.00"),
        # Two seeds decide nothing, and a headline takes five.
        (GOOD[:1], LOW[:1], "final", {"above": 0}, "undecided (3 seeds at least)", "+10.00"),
        (GOOD[:2], LOW[:2], "final", {"above": 0}, "undecided (about 3 seeds)", "+10.05"),
        (GOOD[:3], LOW[:3], "final", {"above": 0}, "holds", "+10.10"),
        (GOOD, LOW, "final", {"above": 0, "headline": True}, "undecided (about 5 seeds)", "+10.15"),
        # A tie is neither above nor below.
        (TIE, TIE, "final", {"above": 0}, "fails", "+0.00"),
        (TIE, TIE, "final", {"below": 0}, "fails", "+0.00"),
        (TIE, TIE, "final", {"within": 0}, "holds", "+0.00"),
        (TIE, TIE, "steps", {"above": 1}, "fails", "1.00 ×"),
        (TIE, TIE, "steps", {"below": 1}, "fails", "1.00 ×"),
        (TIE, TIE, "steps", {"within": 1}, "holds", "1.00 ×"),
        # Other columns, against where the other one ended.
        ([[0.6, 0.5, 0.7]] * 3, [[0.1, 0.6]] * 3, "lowest", {"above": -0.5}, "fails", "-10.00"),
        ([[0.6, 0.5, 0.7]] * 3, [[0.1, 0.6]] * 3, "start", {"within": 0.5}, "holds", "+0.00"),
        (BETTER, WORSE, "average", {"above": 0.4}, "holds", "+0.50"),
        # Steps to the target, which some seeds never reach.
        ([FAST] * 3, SCRATCH, "steps", {"below": 1}, "holds", "0.33 × steps (0.33 to 0.33), n = 3"),
        ([[0.75, *FAST[1:]]] * 3, SCRATCH, "steps", {"below": 1}, "holds", "≤ 0.33 × steps (up to"),
        # No seed got there in all the steps that random_init took; how many it takes was not seen.
        ([NEVER] * 3, SCRATCH, "steps", {"below": 1}, "fails", "≥ 1.00 × steps (from 1.00), n = 3"),
        ([FAST, FAST, NEVER], SCRATCH, "steps", {"below": 1}, "undecided (other budgets)", "≥ "),
    ],
)
def test_verdicts(of, against, measure, region, verdict, value):
    made = make_runs({"e": {"net2net": of, "random_init": against}})
    found = judge(made, measure, "e:net2net", "e:random_init", **region)
    assert (found.verdict, found.value[: len(value)]) == (verdict, value)
    assert found.note == (f"never within the run in {of.count(NEVER)} of 3 seeds" if NEVER in of else "")


def test_what_was_not_run_is_not_judged():
    made = make_runs({"e": {"net2net": [[0, 0.6]] * 3}})
    for of, against in (("e:net2net", "e:random_init"), ("f:net2net", "e:net2net"), ("e/best:random_pad", "e:net2net")):
        found = judge(made, "final", of, against)
        assert (found.verdict, found.value) == ("not run", "–")
        assert pages.claim_line(found, ["e"])[-1] in (
            "[figure](#e)",
            "[figure](#e), [config](../configs/experiment/f.yaml)",
        )
    assert judge(made, "mismatch", "e:net2net", within=0).verdict == "holds"
    made["e", "net2net", 1][0]["step0"]["agree"] = 0
    assert judge(made, "mismatch", "e:net2net", below=50).verdict.startswith("undecided")


def test_one_evaluation_above_the_target_alone_is_not_enough():
    seeds = [make_curve([0.1, 0.7, 0.6, 0.7, 0.8]), make_curve([0.1, 0.7]), make_curve([0.1, 0.6, 0.6])]
    table = DataFrame([row | {"seed": seed} for seed, rows in enumerate(seeds) for row in rows]).set_index("seed")
    reached = curves.find_first_reach(table, Series(0.7, range(3)))["step"]
    assert dict(reached) == {0: 30, 1: 10}  # the last evaluation has no next one


def test_runs_of_different_settings_are_not_judged_together():
    made = make_runs({"e": {"net2net": GOOD, "random_init": LOW}})
    made["e", "random_init", 2][0]["config"]["schedule"] = {"lr": 0.5}
    found = judge(made, "final", "e:net2net", "e:random_init")
    said = "its runs differ in `schedule.lr` (None, 0.5)"
    assert (found.verdict, found.note) == ("undecided (settings differ)", said)


def test_arms_of_one_case_that_were_trained_differently_are_not_judged_together():
    made = make_runs({"e": {"net2net": GOOD, "random_init": LOW, "teacher": LOW}})
    for (_, arm, _), (record, _) in made.items():
        if arm == "net2net":
            record["config"]["schedule"] = {"epochs": "8ep"}
        elif arm == "teacher":
            record |= {"arm": "teacher", "settings": {"schedule": {"epochs": "1ep"}}}
    said = judge(made, "final", "e:net2net", "e:random_init").note
    assert said == "its runs differ in `schedule.epochs` (8ep, None)"
    assert judge(made, "final", "e:net2net", "e:teacher").verdict == "holds"  # a teacher's are its own


def test_the_budget_is_interpolated_between_those_that_were_run():
    made = make_frontier([0.60, 0.70, 0.80], [0.40, 0.55, 0.75])
    found = judge(made, "budget", "f:net2net", "f/4ep:random_init", below=1)
    assert (found.verdict, found.value) == ("holds", "0.71 × compute (0.71 to 0.71), n = 3")  # 2 * sqrt(2) of 4
    # With the teacher's unit: budgets of 3 and 5 reach it at sqrt(15), of 4.
    found = judge(made, "total_budget", "f:net2net", "f/4ep:random_init", below=1)
    assert found.value == "0.97 × compute in all (0.97 to 0.97), n = 3"
    assert judge(made, "budget", "f:net2net", "f/2ep:random_init", below=1).value.startswith("≤ 0.50 ×")
    other = judge(made, "budget", "f:random_init", "f/4ep:net2net", above=1)
    assert (other.verdict, other.value) == ("holds", "≥ 1.00 × compute (from 1.00), n = 3")
    assert other.note == "not with the largest budget in 3 of 3 seeds"
    for (_, arm, _), (_, points) in made.items():
        if arm == "net2net":
            points[0]["test_accuracy"] = 0.56  # at the target before it is trained
    found = judge(made, "budget", "f:net2net", "f/2ep:random_init", below=1)
    assert found.note == "untrained already in 3 of 3 seeds"
    with pytest.raises(ExperimentError, match=r"there are 3 \(f/1ep, f/2ep, f/4ep\): name a case"):
        judge(made, "final", "f:net2net", "f/1ep:random_init")


def test_of_seeds_that_lack_a_budget_nothing_is_interpolated():
    made = make_frontier([0.60, 0.70, 0.80], [0.40, 0.55, 0.75], seeds=4)
    whole = judge(made, "budget", "f:net2net", "f/4ep:random_init", below=1).value
    del made["f/2ep", "net2net", 1]  # between 1 and 4 it would be elsewhere
    left = judge(made, "budget", "f:net2net", "f/4ep:random_init", below=1).value
    assert left == whole.replace("n = 4", "n = 3")


def test_the_best_case_is_chosen_on_the_holdout_and_measured_on_the_test_images():
    ends = {"low": 0.5, "high": 0.7, "mid": 0.6}
    made = make_runs({f"t/{name}": {"net2net": [[0, end]] * 3, "random_init": LOW[:3]} for name, end in ends.items()})
    for seed in range(3):
        made["t/mid", "net2net", seed][1][-1]["holdout_accuracy"] = 0.9
    found = judge(made, "final", "t/best:net2net", "t/high:net2net")
    assert found.value == "-10.00 points (-10.00 to -10.00), n = 3"
    assert found.note == "best of 3 for net2net: mid (3 of 3 seeds)"
    with pytest.raises(ExperimentError, match="the best case is of several: name a case"):
        judge(made, "steps", "t/best:net2net", "t/low:random_init", below=1)


def test_the_best_case_of_a_seed_is_that_of_the_others():
    # Each case has luck in one seed. Chosen by the same seed, it would look a hundred times as good.
    lucky = DataFrame({case: [0.5 + 0.1 * (seed == place) for seed in range(3)] for place, case in enumerate("abc")})
    assert all(lucky.at[seed, case] == 0.5 for seed, case in analysis_cases.choose_cases(lucky).items())
    assert analysis_cases.choose_cases(DataFrame({"a": {0: 0.5}, "b": {0: 0.6}})) == {0: "b"}
    missing = DataFrame({"a": {0: 0.5, 1: 0.5}, "b": {1: 0.4}})  # only seeds that all cases have count
    assert analysis_cases.choose_cases(missing) == {1: "a"}
    assert analysis_cases.choose_cases(DataFrame()) == {}


def test_the_best_case_is_not_known_until_all_were_run():
    cases = analysis_cases.find_planned("tune_ladder", "net2net")
    assert cases == {"x0.1", "x0.3", "x1", "x2", "10ep_x0.1", "10ep_x0.3", "10ep_x1"}
    made = make_runs({f"tune_ladder/{case}": {"net2net": [[0, 0.5]] * 3} for case in cases})
    operands = "tune_ladder/x0.1:net2net", "tune_ladder/best:net2net"
    assert judge(made, "final", *operands, above=-0.5).verdict == "holds"
    made = {key: run for key, run in made.items() if key[0] != "tune_ladder/x2"}
    assert judge(made, "final", *operands, above=-0.5).verdict == "not run"
    assert analysis_cases.find_planned("when_to_grow", "random_init") == {"start", "start_half", "start_double"}


def test_average_accuracy_is_an_area():
    seeds = make_curve([0.0, 0.4, 0.4]), make_curve([0.0, 0.4, 0.4], at=[0, 10, 50])
    table = DataFrame([row | {"seed": seed} for seed, rows in enumerate(seeds) for row in rows]).set_index("seed")
    assert list(curves.average_over_training(table)) == pytest.approx([0.3, (0.2 * 10 + 0.4 * 40) / 50])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("paper: p, measure: finel, above: 0", "no measure 'finel' (did you mean 'final'?)"),
        ("paper: p, measure: final, over: 0", "A claim has no 'over'"),
        ("paper: p, measure: final", "by one of above, below and within"),
        ("measure: final, above: 0", "paper"),
        ("paper: p, measure: final, above: 0", "name the other one with against"),
        ("paper: p, measure: accuracy, against: 'e:b', above: 0", "is of one run: leave against out"),
        ("paper: p, measure: steps, against: 'e:b', above: 0", "0 is no end of steps: ratios are above 0"),
        ("paper: p, measure: budget, against: 'e:b', within: 0.9", "0.9 is no end of budget: ratios are above 0, and"),
    ],
)
def test_a_malformed_claim_is_named(tmp_path, entry, message):
    (tmp_path / "claims.yaml").write_text(f"- {{claim: c, source: s, of: 'e:a', {entry}}}\n")
    with pytest.raises(ExperimentError, match=f"the claim 'c': .*{re.escape(message)}"):
        read_claims(tmp_path / "claims.yaml")


def test_claims_stand_in_groups_or_alone():
    rest = "source: s, paper: p, measure: final, of: 'e:a', against: 'e:b', above: 0}"
    text = f"- {{claim: alone, {rest}\n- group: G\n  claims:\n  - {{claim: one, {rest}\n  - {{claim: two, {rest}\n"
    found = claims.parse_claims(text, "here")
    assert [(one.claim, one.group) for one in found] == [("alone", ""), ("one", "G"), ("two", "G")]
    assert len({one.question for one in found}) == 1
    with pytest.raises(ExperimentError, match="here, the claim 'two': A claim has no 'over'"):
        claims.parse_claims(text.replace("above: 0}\n", "over: 0}\n").replace("over", "above", 2), "here")
    with pytest.raises(ExperimentError, match="A claim has no 'claims'"):
        claims.parse_claims("- {claims: []}", "here")


def test_notes_stand_below_the_table_of_their_group():
    made = make_runs({"e": {"net2net": [NEVER] * 3, "random_init": SCRATCH}})
    claim = Claim("c", "4.2", "faster", "steps", "e:net2net", "e:random_init", below=1, group="G")
    other = Claim("d", "ours", "–", "final", "f:net2net", "f:random_init", above=0, group="H")
    findings = [
        claims.judge(one, make_results((*key, *run) for key, run in made.items())) for one in (claim, claim, other)
    ]
    first, second = pages.claims_section(findings, ["e"]).partition("### G\n\n")[2].split("\n\n### H\n\n")
    line = "| c | 4.2: faster | ≥ 1.00 × steps (from 1.00), n = 3 ¹ | **fails** | [figure](#e) |"
    assert first.split("\n")[2:] == [line, line, "", "¹ never within the run in 3 of 3 seeds"]
    assert second.split("\n")[2:] == ["| d | ours | – | not run | [config](../configs/experiment/f.yaml) |"]


@pytest.mark.parametrize("verdict", ["undecided (over 1,000 seeds)", "not run"])
def test_the_line_of_a_claim_fits_whatever_the_curves_say(verdict):
    run = verdict != "not run"
    ratio = Estimate(-math.log(9), -math.log(9), -math.log(9), values=(0.0,) * 5)
    points = Estimate(-12.0, -12.0, -12.0, values=(0.0,) * 5)
    for claim in COMMITTED:
        value = claims.format_estimate(ratio if claims.MEASURES[claim.measure].ratio else points, claim.measure)
        finding = Finding(claim, verdict, value if run else "–", "a note" if run else "")
        table = pages.noted_table(["claim"] * 5, [pages.claim_line(finding, claim.experiments if run else [])])
        assert max(map(len, table.splitlines())) <= 200, claim.claim
        assert claim.group


def test_the_committed_claims_cover_the_paper_and_some_are_headlines():
    assert len(COMMITTED) > 30
    sources = " ".join(one.source for one in COMMITTED)
    assert all(section in sources for section in ("3.3", "3.4", "4.2", "4.3", "4.4"))
    assert HEADLINE_SEEDS == 5 and sum(one.headline for one in COMMITTED) >= 5


OPERANDS = sorted({text for one in COMMITTED for text in (one.of, one.against) if text})


@pytest.mark.parametrize("experiment", sorted({re.split("[/:]", text)[0] for text in OPERANDS}))
def test_every_operand_is_an_arm_of_a_case_of_an_experiment(experiment):
    configs = cases(f"experiment={experiment}")
    for text in (text for text in OPERANDS if re.split("[/:]", text)[0] == experiment):
        name, _, label = text.partition(":")
        case = name.partition("/")[2]
        chosen = [config for config in configs if case in ("", "best", config.case)]
        assert chosen, f"{experiment} has no case {case}"
        student, arm = split_arm(label)
        assert any(arm in (*config.arms, "teacher") for config in chosen), text
        assert student is None or all(student in config.students for config in chosen), text
