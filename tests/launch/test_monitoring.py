"""Dashboard, alerts and the page of all metrics go with the definitions; what a server exports is
compared with them in ``tests/e2e``."""

import re
import subprocess
from pathlib import Path

import prometheus_client
import pytest
import yaml

from launch.monitoring import dashboard, reference
from sglang_ext.adapter import metric_definitions as definitions
from sglang_ext.adapter.exported import Exported
from sglang_ext.core.counters import NAMES
from tests.conftest import ROOT
from tests.fixtures.queries import ALERTS, queries
from tests.fixtures.registry import own_registry
from tests.fixtures.scrape import Scrape

UNITS = ("_total", "_tokens", "_bytes", "_seconds", "_requests", "_uses", "_ratio")
WITHOUT_UNIT = {"transfers_in_flight", "host_sampling", "retention_learned"}


def test_the_page_and_the_dashboard_are_what_the_code_says() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == reference.page()
    file = ROOT / "launch" / "monitoring" / "dashboard.json"
    assert file.read_text() == dashboard.text()


def test_names_follow_prometheus() -> None:
    names = [definition.name for definition in definitions.METRICS]
    assert len(set(names)) == len(names)
    for definition in definitions.METRICS:
        assert re.fullmatch("[a-z_]+", definition.name)
        counts = definition.kind is definitions.Kind.COUNTER
        assert counts == definition.name.endswith("_total")
        assert definition.name.endswith(UNITS) != (definition.name in WITHOUT_UNIT)
        assert bool(definition.buckets) == (definition.kind is definitions.Kind.HISTOGRAM)
        assert list(definition.buckets) == sorted(set(definition.buckets))


def test_every_counter_of_the_core_is_exported_once() -> None:
    exported = [name for pair in definitions.TOKEN_EVENTS.values() for name in pair if name]
    exported += definitions.EVENTS
    exported += [name for name in NAMES if name.startswith(("declined_", "unfulfilled_"))]
    assert sorted(exported) == sorted(NAMES)


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in dashboard.dashboard()["panels"]]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23


def test_queries_name_what_is_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own metrics are looked up on a server alone."""
    registry = own_registry(monkeypatch)
    exported = Exported({"tp_rank": "0"}, set(definitions.Where))
    for name in ("retention_stay_requests", "retention_returns_ratio"):
        exported.child(name, "turn 2").set(1)
    exported.child("namespace_bytes", "tenant-7", "", "used").set(1)
    scrape = Scrape(prometheus_client.generate_latest(registry).decode())
    ours = [(query, legend) for query, legend in queries() if "sglang:" not in query]
    assert len(ours) > 30
    assert not [fault for query in ours for fault in scrape.faults(*query)]
    used = {name for query, _ in queries() for name in re.findall(r"sglang_ext:(\w+)", query)}
    used = {re.sub("_(bucket|sum|count)$", "", name) for name in used}
    unused = {definition.name for definition in definitions.METRICS} - used
    assert not unused, "nobody looks at them"
    wrong = ("rate(sglang_ext:nothing_total[5m])", 'sglang_ext:kv_bytes{tier="moon"}')
    wrong += ("sum by (reason) (sglang_ext:kv_bytes)",)
    assert all(list(scrape.faults(query)) for query in wrong)


def test_every_alert_says_what_to_do() -> None:
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    for rule in rules:
        assert rule["labels"]["severity"] in {"info", "warning"}
        assert set(rule["annotations"]) == {"summary", "description"}
    tested = (ROOT / "tests" / "launch" / "alerts_test.yaml").read_text()
    assert all(f"alertname: {rule['alert']}" in tested for rule in rules)
    assert f"value: {len(rules)}\n" in tested


@pytest.mark.full
def test_promtool_takes_rules_and_queries_and_fires_every_alert(tmp_path: Path) -> None:
    script = ROOT / "launch" / "monitoring" / "promtool.sh"
    subprocess.run(["sh", str(script), str(tmp_path)], check=True)
    rules = [
        {"record": f"panel:{n}", "expr": query.replace("$__rate_interval", "5m")}
        for n, (query, _) in enumerate(queries())
    ]
    panels = tmp_path / "panels.yaml"
    panels.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    for check in (
        ("check", "rules", str(ALERTS), str(panels)),
        ("test", "rules", str(ROOT / "tests" / "launch" / "alerts_test.yaml")),
    ):
        told = subprocess.run(
            [str(tmp_path / "promtool"), *check], capture_output=True, text=True, check=False
        )
        assert told.returncode == 0, told.stdout + told.stderr
