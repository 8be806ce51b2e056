"""Alerts and dashboard: every name exists, every expression is valid, every alert rings where it should.

That every panel returns data of a real run is tested in `test_live_prometheus.py`.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import yaml
from operations import MONITORING, dashboard, filled, names_in, panels, promtool, samples_of_metrics

from pipeline.metrics import METRICS

VARIABLES = {"cluster": "west", "job": "latentmill", "run": "nightly", "__rate_interval": "1m"}


def _rules() -> list[dict[str, Any]]:
    loaded = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    return [rule for group in loaded["groups"] for rule in group["rules"]]


def test_alerts_and_panels_use_metrics_that_exist() -> None:
    known = samples_of_metrics()
    for rule in _rules():
        assert names_in(rule["expr"]), rule["alert"]
        assert names_in(rule["expr"]) <= known, rule["alert"]
    for title, expressions in panels():
        for expression in expressions:
            assert names_in(expression), title
            assert names_in(expression) <= known, title


def test_every_live_metric_is_on_the_dashboard() -> None:
    shown = {name for _, expressions in panels() for expression in expressions for name in names_in(expression)}
    at_the_end_only = {"latentmill_run_end_timestamp_seconds", "latentmill_run_exit_code"}
    at_the_end_only |= {"latentmill_run_success_timestamp_seconds"}
    for name, row in METRICS.items():
        if name not in at_the_end_only:
            assert (name if row.kind != "histogram" else f"{name}_sum") in shown, name


def test_every_selector_of_the_dashboard_chooses_cluster_job_and_run() -> None:
    for title, expressions in panels():
        for expression in expressions:
            selectors = re.findall(r"latentmill_[a-z_]+(\{[^}]*\})?", expression)
            for selector in selectors:
                for label in ("cluster", "job", "run"):
                    assert f'{label}=~"${label}"' in selector, f"{title}: {expression}"
    names = [variable["name"] for variable in dashboard()["templating"]["list"]]
    assert names == ["datasource", "cluster", "job", "run"]


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        for cell in itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])):
            assert cell not in taken, f"{panel['title']} lies over {taken.get(cell)}"
            taken[cell] = panel["title"]


def test_the_rule_of_the_operator_says_what_the_rules_file_says() -> None:
    operator = yaml.safe_load((MONITORING / "prometheusrule.yaml").read_text())
    assert operator["spec"] == yaml.safe_load((MONITORING / "alerts.yaml").read_text())


def test_every_alert_is_tested_ringing_and_silent() -> None:
    tests = yaml.safe_load((MONITORING / "alerts_test.yaml").read_text())["tests"]
    ringing, silent = set(), set()
    for test in tests:
        runs = set(re.findall(r'run="(\w+)"', " ".join(series["series"] for series in test["input_series"])))
        for asked in test["alert_rule_test"]:
            (ringing if asked["exp_alerts"] else silent).add(asked["alertname"])
            if len(runs) > len(asked["exp_alerts"]) > 0:
                silent.add(asked["alertname"])
    assert ringing == silent == {rule["alert"] for rule in _rules()}


def test_alerts_keep_the_labels_of_the_run_and_say_what_to_do() -> None:
    for rule in _rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert "{{ $labels.run }} ({{ $labels.cluster }})" in rule["annotations"]["summary"]
        assert rule["annotations"]["description"]


def test_the_alerts_ring_where_they_should_and_nowhere_else() -> None:
    promtool("check", "rules", "alerts.yaml", cwd=MONITORING)
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yaml", cwd=MONITORING)


def test_every_expression_of_the_dashboard_is_valid(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": filled(expression, VARIABLES)}
        for number, expression in enumerate(expression for _, all_of in panels() for expression in all_of)
    ]
    path = tmp_path / "panels.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", str(path))
    assert not any("$" in rule["expr"] for rule in rules)
