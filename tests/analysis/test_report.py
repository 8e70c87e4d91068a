"""The page of results: all of it in one file, and its scripts do what they say in a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from experiments.analysis.curves import load_all
from scripts import report

RESULTS = Path(__file__).parents[2] / "results"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# What a person does: sort the claims by verdict, twice, and by measured value; look at the second seed.
ACTS = """<script>
const claims = document.querySelector("table"), click = index => claims.querySelectorAll("button")[index].click();
const column = index => [...claims.tBodies[0].rows].map(row => row.cells[index].textContent);
const found = {all: plot.querySelectorAll("polygon").length, arms: legend.children.length};
click(4); found.up = column(4); click(4); found.down = column(4); click(3); found.values = column(3).map(number);
seed.value = 2; seed.dispatchEvent(new Event("input"));
Object.assign(found, {shown: shown.textContent, bands: plot.querySelectorAll("polygon").length});
found.points = [...plot.querySelectorAll("polyline")].map(line => line.getAttribute("points").split(" ").length);
found.seconds = Object.values(Object.values(curves)[0]).map(arm => Object.values(arm.seeds)[1].length);
document.body.innerHTML = ""; document.body.append("found:" + JSON.stringify(found) + ":end");
</script>"""


@pytest.fixture(scope="module")
def page() -> str:
    return report.make_report(RESULTS)


class Reader(HTMLParser):
    """Notes every tag's attributes, and the text of every cell."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "td":
            self.cells.append(data)


@pytest.mark.slow
def test_every_figure_claim_and_curve_is_there_and_nothing_is_fetched(page):
    reader = Reader()
    reader.feed(page)
    images = {str(found["alt"]): str(found["src"]) for tag, found in reader.tags if tag == "img"}
    assert images.keys() == {path.stem for path in (RESULTS / "figures").glob("*.svg")}
    assert all(source.startswith("data:image/svg+xml;base64,") for source in images.values())
    groups = yaml.safe_load((RESULTS / "claims.yaml").read_text())
    claims = [claim["claim"] for group in groups for claim in group["claims"]]
    assert claims and set(claims) <= set(reader.cells)
    curves = json.loads(re.findall(r"<script id=data type=application/json>(.*?)</script>", page, re.DOTALL)[0])
    expected = load_all(RESULTS / "curves").experiments
    assert list(curves) == [f"{name}/{case}".rstrip("/") for name, cases in expected.items() for case in cases]
    outside = [
        (tag, found) for tag, found in reader.tags if tag in ("link", "iframe") or (tag == "script" and "src" in found)
    ]
    assert outside == [] and "<!-- " not in page
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//|@import|fetch\(|XMLHttpRequest""", page)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_sorts_the_claims_and_shows_one_seed(page, tmp_path):
    (tmp_path / "report.html").write_text(page + ACTS)
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    command = [str(BROWSER), *options, (tmp_path / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = json.loads(re.findall(r"found:(\{.*\}):end", done.stdout)[-1])
    assert found["up"] == sorted(found["up"]) and found["down"] == sorted(found["up"], reverse=True)
    assert set(found["up"]) >= {"holds", "fails", "not run"}
    numbers = [value for value in found["values"] if value is not None]
    assert numbers == sorted(numbers) and found["values"][: len(numbers)] == numbers  # those without one come last
    assert found["all"] == found["arms"] > 3 and found["bands"] == 0
    assert found["shown"] == "1" and found["points"] == found["seconds"]


def test_a_figure_that_was_not_drawn_is_named(tmp_path, capsys):
    shutil.copytree(RESULTS / "curves/quickstart", tmp_path / "curves/quickstart")
    (tmp_path / "claims.yaml").write_text("[]")
    assert report.main(["--results", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"There is no {tmp_path}/figures/quickstart.svg: run ")
    shutil.copytree(RESULTS / "figures", tmp_path / "figures")
    assert report.main(["--results", str(tmp_path)]) == 0
    assert "<h2 id=quickstart>" in (tmp_path / "report.html").read_text()
