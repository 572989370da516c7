"""A page about a server or a benchmark, from stand-ins."""

import html.parser
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_ext.tools.report import cli, units
from sglang_ext.tools.report.charts import Axis, Series, bars, columns
from tests.conftest import ROOT
from tests.tools.report_texts import later, text

DEMO = ROOT / "docs" / "benchmarks" / "data" / "demo.json"
VOID = {"meta", "link", "rect", "line", "polyline", "circle"}


class Page(html.parser.HTMLParser):
    """What a page has: its tags, the attributes of each, its text, cells of tables by caption."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._caption = ""
        self.feed(text)
        assert not self._open, "a tag is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.tables.setdefault(self._caption, []).append([])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        where = self._open[-1] if self._open else ""
        self.texts.append(data)
        if where == "caption":
            self._caption = data
        elif where in ("th", "td"):
            self.tables[self._caption][-1].append(data)

    def rows(self, caption: str) -> dict[str, list[str]]:
        """A table's cells by their row's name."""
        return {name: cells for name, *cells in self.tables[caption][1:]}


def report(tell: Callable[..., str], out: Path, *texts: str, seconds: str = "0.04") -> Page:
    """The page about a server that exports one text after the other."""
    watch = ["--seconds", seconds, "--every", "0.02"]
    assert cli.main(["--url", tell(*texts), "--out", str(out), *watch]) == 0
    return Page(out.read_text())


def test_hits_recompute_bytes_and_declines_are_those_of_the_time_watched(
    tell: Callable[..., str], tmp_path: Path
) -> None:
    page = report(tell, tmp_path / "report.html", text(), later())
    shares = Counter(cell for row in page.rows("Hit rate over time").values() for cell in row)
    assert shares["25 %"] == 1, "100 of 400 prompt tokens came from the device"
    assert shares["50 %"] == 1
    causes = page.rows("Computed prompt tokens by cause")
    assert causes["new"] == ["100", "1,100"]
    assert causes["window lost"] == ["0", "7"]
    moved = page.rows("Bytes moved")
    assert moved["device to host"] == ["2 MB", "5 MB"]
    assert moved["storage to host"] == ["0 B", "0 B"]
    assert page.rows("Transfers declined")["host full"] == ["3", "4"]
    said = " ".join(page.texts)
    assert "75 %" in said, "found in all"


def test_occupancy_has_components_tiers_and_limits(
    tell: Callable[..., str], tmp_path: Path
) -> None:
    page = report(tell, tmp_path / "report.html", text(), later())
    device = next(iter(page.rows("Device").values()))
    assert device == ["100 MB", "20 MB", "0 B", "40 MB"]
    host = next(iter(page.rows("Host").values()))
    assert host == ["6 GB", "1 GB", "0 B"]
    said = " ".join(page.texts)
    assert "limit: 200 MB" in said
    assert "limit: 10 GB" in said


def test_the_retention_curve_is_what_is_left_of_the_histogram(
    tell: Callable[..., str], tmp_path: Path
) -> None:
    page = report(tell, tmp_path / "report.html", text())
    assert page.rows("Retention curve") == {"0 s": ["100 %"], "1 s": ["75 %"], "1 min": ["25 %"]}
    assert page.rows("Pages that come back") == {"turn 2": ["50 %"], "first": ["12.5 %"]}
    assert page.rows("How long pages stay") == {"turn 2": ["900"], "first": ["10"]}


def test_an_idle_server_has_its_figures_since_its_start(
    tell: Callable[..., str], tmp_path: Path
) -> None:
    page = report(tell, tmp_path / "report.html", text(), seconds="0")
    said = " ".join(page.texts)
    assert "of prompt tokens found, since its start" in said
    assert "Hit rate over time" not in page.tables
    assert page.rows("Device"), "one look is enough for what is there now"


def test_a_page_is_one_file_and_can_be_read_without_its_pictures(
    tell: Callable[..., str], tmp_path: Path
) -> None:
    address = tell(text(), later())
    out = tmp_path / "new" / "report.html"
    options = ["--out", str(out), "--seconds", "0.04", "--every", "0.02"]
    assert cli.main(["--url", address, *options]) == 0
    written = out.read_text()
    links = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\' )>]+)', written)
    assert links == ["data:,"], "nothing is asked for"
    page = Page(written)
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "iframe", "img"} & set(tags)
    assert tags.count("svg") == tags.count("table") == tags.count("details") > 6
    assert ("html", {"lang": "en"}) in page.tags
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    assert "prefers-color-scheme: dark" in written


def test_a_name_is_never_markup(tell: Callable[..., str], tmp_path: Path) -> None:
    evil = text().replace('class="first"', 'class="<script>alert(1)</script>"')
    page = report(tell, tmp_path / "report.html", evil)
    assert "script" not in [tag for tag, _ in page.tags]
    assert "<script>alert(1)</script>" in page.rows("Pages that come back")


def test_a_server_that_goes_away_leaves_a_report(
    tell: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    watch = ["--seconds", "60", "--every", "0.01", "--out", str(out)]
    assert cli.main(["--url", tell(text(), later(), "nothing"), *watch]) == 1
    assert "ended early" in capsys.readouterr().err
    assert Page(out.read_text()).rows("Bytes moved")["device to host"] == ["2 MB", "5 MB"]


def test_no_server_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    assert cli.main(["--url", "http://127.0.0.1:9", "--out", str(out)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not out.exists()


def test_a_server_that_has_started_anew_counts_from_nothing(
    tell: Callable[..., str], tmp_path: Path
) -> None:
    page = report(tell, tmp_path / "report.html", later(), text())
    assert page.rows("Bytes moved")["device to host"] == ["3 MB", "3 MB"]


def test_runs_of_a_benchmark(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert cli.main(["--bench", str(DEMO), "--out", str(out)]) == 0
    page = Page(out.read_text())
    assert page.rows("Hit rate by tier")["ours, device + host"] == ["6.4 %", "57.6 %", "0 %"]
    assert len(page.rows("stock + HiCache")) == 5
    log = tmp_path / "log.jsonl"
    runs = json.loads(DEMO.read_text())
    log.write_text("".join(json.dumps(run) + "\n" for run in runs.values()))
    assert cli.main(["--bench", str(log), "--out", str(out)]) == 0
    assert "3. ours, device + host" in Page(out.read_text()).rows("Throughput")


@pytest.mark.parametrize("said", ["", "[]", "{}", "words", '{"a": 1}', '{"a": {"rounds": [1]}}'])
def test_what_is_no_benchmark_is_one_line(
    tmp_path: Path, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.json"
    file.write_text(said)
    assert cli.main(["--bench", str(file), "--out", str(tmp_path / "report.html")]) == 1
    told = capsys.readouterr().err
    assert str(file) in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "--url --bench"),
        (["--url", "x"], "--url 'x'"),
        (["--url", "http://127.0.0.1:9", "--every", "0"], "--every 0"),
        (["--url", "http://127.0.0.1:9", "--seconds", "-1"], "--seconds -1"),
        (["--bench", "nowhere.json"], "--bench nowhere.json"),
    ],
)
def test_a_bad_argument_is_one_line(
    options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(options)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("form", "value", "said"),
    [
        (units.share, 0.5, "50 %"),
        (units.share, 0.1234, "12.3 %"),
        (units.size, 999, "999 B"),
        (units.size, 1.5e9, "1.5 GB"),
        (units.speed, 2e6, "2 MB/s"),
        (units.count, 999_999, "999,999"),
        (units.count, 2.5e6, "2.5 M"),
        (units.count, 3e9, "3 G"),
        (units.seconds, 0.5, "500 ms"),
        (units.seconds, 90, "1.5 min"),
        (units.seconds, 86400, "1 d"),
    ],
)
def test_numbers_have_units(form: units.Format, value: float, said: str) -> None:
    assert form(value) == said


def test_axes_end_at_round_numbers() -> None:
    assert units.ticks(0.0) == [0.0, 1.0]
    for most in (1e-3, 0.99, 1.0, 7.0, 1234.0, 2**40):
        marks = units.ticks(most)
        assert marks[0] == 0
        assert most <= marks[-1] <= 2 * most
        assert 2 <= len(marks) <= 6


def test_columns_stack_to_the_sum() -> None:
    """Heights of what is drawn are as the values are."""
    drawn = columns(
        "c",
        "n",
        [0.0, 1.0, 2.0],
        [Series("a", "c1", [1.0, None]), Series("b", "c2", [3.0, 2.0])],
        (Axis("x", units.count), Axis("y", units.count)),
    )
    boxes = re.findall(r'<rect class="(c\d)" x="([\d.]+)" y="([\d.]+)" .*?height="([\d.]+)"', drawn)
    assert [box[0] for box in boxes] == ["c1", "c2", "c2"]
    heights = [float(box[3]) for box in boxes]
    assert heights[1] == pytest.approx(3 * heights[0], abs=0.5)
    assert float(boxes[1][2]) + heights[1] == pytest.approx(float(boxes[0][2]), abs=0.11)


def test_the_table_has_more_names_than_the_chart() -> None:
    names = [f"name {number}" for number in range(30)]
    drawn = bars("c", "n.", names, [Series("s", "c1", [1.0] * 30)], Axis("x", units.count))
    assert drawn.count("<rect") == 12
    assert drawn.count('scope="row"') == 30
    assert "The first 12 of 30; the table has all." in drawn
