"""The dashboard and the alerts ask for what the server tells, in queries that Prometheus can parse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import promql_parser
import pytest
import yaml

MONITORING = Path(__file__).resolve().parents[2] / "k8s" / "components" / "monitoring"
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
[GROUP] = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"]
QUERIES = [
    *(target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]),
    *(rule["expr"] for rule in GROUP["rules"]),
]


def parsed(query: str) -> promql_parser.Expr:
    """The query with Grafana's variables filled in."""
    return promql_parser.parse(query.replace("$__rate_interval", "5m").replace("$job", ".+"))


@pytest.mark.parametrize("query", QUERIES)
def test_prometheus_understands_it_and_the_server_tells_it(query, client, wave, encode):
    parsed(query)
    client.post("/v1/units", content=encode(wave), headers={"Content-Type": "audio/wav"})
    exposed = client.get("/metrics").text
    told = {*re.findall(r"^# TYPE (\w+)", exposed, re.MULTILINE), *re.findall(r"^(\w+)[{ ]", exposed, re.MULTILINE)}
    asked = set(re.findall(r"\b(?:sonorant|process)_\w+", query))
    assert asked
    assert asked <= told, asked - told


def test_labels_that_are_asked_for_exist(client, wave, encode):
    client.post("/v1/units", content=encode(wave), headers={"Content-Type": "audio/wav"})
    exposed = client.get("/metrics").text
    told = {*re.findall(r"(\w+)=\"", exposed), "job", "instance"}  # the last two are Prometheus' own
    asked = {label for query in QUERIES for part in re.findall(r"by \(([^)]*)\)", query) for label in part.split(", ")}
    asked |= {label for query in QUERIES for label in re.findall(r"(\w+)=~?\"", query)}
    assert asked <= told, asked - told


def test_panels_do_not_overlap():
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        mine = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & mine, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= mine
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_every_alert_says_what_to_do():
    for rule in GROUP["rules"]:
        assert {"summary", "description"} <= rule["annotations"].keys(), rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")
