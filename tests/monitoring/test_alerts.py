"""Alerts and dashboard against a real Prometheus: each rule fires for its case, each query is read.

What Prometheus scrapes here is what operator, router and worker export, from their own registries.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

import debian_package
import exported_metrics
from eventually import eventually_in_another_process
from tandem_operator.reconcile.prometheus import queried
from tandem_operator.resources import Router
from tandem_operator.resources.autoscaling import AutoscalingPolicySpec
from tandem_operator.resources.crds import _TYPES as KINDS
from tandem_router.policy.terms import Reason, ScoreStatus

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from reference import codes  # noqa: E402

Object = dict[str, Any]

RULES = ROOT / "charts" / "tandem" / "files" / "alerts.yaml"
DASHBOARD = ROOT / "charts" / "tandem" / "files" / "dashboard.json"
RUNBOOKS = ROOT / "docs" / "monitoring.md"

ALERTS = {r["alert"]: r for g in yaml.safe_load(RULES.read_text())["groups"] for r in g["rules"]}


def condition(kind: str, type_: str, status: str, reason: str) -> str:
    labels = f'kind="{kind}", namespace="n", name="x", type="{type_}"'
    return f'tandem_operator_condition{{{labels}, status="{status}", reason="{reason}"}}'


def requests(status: str) -> str:
    return f'tandem_requests_total{{namespace="n", router="x", status="{status}"}}'


def decisions(reason: str) -> str:
    return f'tandem_decisions_total{{namespace="n", router="x", reason="{reason}"}}'


ON_ROUTER = '{namespace="n", router="x"}'
FLOOR = {f"tandem_operator_quality_floor{ON_ROUTER}": "0.95x200"}

# Series that make an alert fire within two hours, a minute apart. `_` holds the value.
CASES: dict[str, Object] = {
    "TandemQualityFloorBroken": FLOOR
    | {f"tandem_measured_quality_ratio_high{ON_ROUTER}": "0.9x200"},
    "TandemQualityExpectedBelowFloor": FLOOR
    | {f"tandem_expected_quality_ratio{ON_ROUTER}": "0.9x200"},
    "TandemPredictorDrifted": {
        decisions("out-of-distribution"): "0+6x200",
        decisions("gain"): "0+6x200",
    },
    "TandemPredictorFailing": {
        'tandem_predictor_outcomes_total{namespace="n", router="x", outcome="late"}': "0+6x200",
        'tandem_predictor_outcomes_total{namespace="n", router="x", outcome="ok"}': "0+6x200",
    },
    "TandemBudgetBurning": {condition("Router", "WithinBudget", "False", "OverSpend"): "1x200"},
    "TandemSpendAboveBudget": {
        f"tandem_operator_budget_usd_per_hour{ON_ROUTER}": "6x200",
        f"tandem_cost_usd_total{ON_ROUTER}": "0+0.2x200",
    },
    "TandemSLOMissed": {condition("Router", "SLOMet", "False", "Missed"): "1x200"},
    "TandemRequestsFailing": {requests("503"): "0+6x200", requests("200"): "0+6x200"},
    "TandemNotReady": {condition("Model", "Ready", "False", "InsufficientGPU"): "1x200"},
    "TandemTierDegraded": {condition("Router", "Ready", "True", "Degraded"): "1x200"},
    "TandemKVLinkDown": {condition("Model", "KVLinkReady", "False", "KVLinkFailed"): "1x200"},
    "TandemRolloutStuck": {condition("Model", "Progressing", "True", "WaitingForRoom"): "1x200"},
    "TandemStoreFailing": {condition("Router", "Durable", "False", "StoreUnavailable"): "1x200"},
    "TandemOperatorDown": {},
    "TandemOperatorFailing": {
        'tandem_operator_failures_total{namespace="n"}': "0+6x200",
        'tandem_operator_passes_total{namespace="n"}': "0+6x200",
    },
}
# As they are while all is well; no alert may fire.
WELL: Object = FLOOR | {
    f"tandem_measured_quality_ratio_high{ON_ROUTER}": "0.99x200",
    f"tandem_expected_quality_ratio{ON_ROUTER}": "0.97x200",
    decisions("gain"): "0+6x200",
    'tandem_predictor_outcomes_total{namespace="n", router="x", outcome="ok"}': "0+6x200",
    f"tandem_operator_budget_usd_per_hour{ON_ROUTER}": "6x200",
    f"tandem_cost_usd_total{ON_ROUTER}": "0+0.01x200",
    requests("200"): "0+6x200",
    requests("503"): "0+0.1x200",
    condition("Router", "Ready", "True", "Serving"): "1x200",
    condition("Model", "Progressing", "False", "Complete"): "1x200",
    condition("Model", "Ready", "False", "ScaledToZero"): "1x200",
    "tandem_operator_leading": "1x200",
    'tandem_operator_passes_total{namespace="n"}': "0+6x200",
}
# Nothing was measured yet: a ratio of 0 breaks no floor.
UNMEASURED: Object = FLOOR | {
    f"tandem_measured_quality_ratio_high{ON_ROUTER}": "0x200",
    "tandem_operator_leading": "1x200",
}


@pytest.fixture(scope="module")
def tools() -> Path:
    return debian_package.folder("prometheus", "prometheus", "promtool")


def scenario(series: Object, expected: dict[str, bool]) -> Object:
    """A test of promtool: which alerts fire after two hours of these series."""
    return {
        "interval": "1m",
        "input_series": [{"series": s, "values": v} for s, v in series.items()],
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertstate="firing", alertname="{alert}"}}) or vector(0)',
                "eval_time": "2h",
                "exp_samples": [{"labels": "{}", "value": int(fires)}],
            }
            for alert, fires in expected.items()
        ],
    }


def test_each_alert_fires_for_its_case_and_none_while_all_is_well(
    tools: Path, tmp_path: Path
) -> None:
    assert set(CASES) == set(ALERTS)
    silent = dict.fromkeys(ALERTS, False)
    tests = [scenario(series, {alert: True}) for alert, series in CASES.items()]
    tests += [scenario(WELL, silent), scenario(UNMEASURED, silent)]
    file = tmp_path / "tests.yaml"
    whole = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}
    file.write_text(yaml.safe_dump(whole))

    checked = subprocess.run(
        [tools / "promtool", "check", "rules", RULES], capture_output=True, text=True
    )
    tested = subprocess.run(
        [tools / "promtool", "test", "rules", file], capture_output=True, text=True
    )

    assert checked.returncode == 0, checked.stderr
    assert f"{len(ALERTS)} rules found" in checked.stdout
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_each_alert_has_its_runbook_and_asks_for_words_that_the_code_says() -> None:
    sections = re.findall(r"^### (Tandem\w+)$", RUNBOOKS.read_text(), re.MULTILINE)
    types, reasons = codes.conditions()

    assert sections == list(ALERTS)
    known = {
        "kind": set(KINDS),
        "type": types,
        "reason": reasons | {r.value for r in Reason},
        "outcome": {s.value for s in ScoreStatus},
    }
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("critical", "warning"), name
        for label, values in re.findall(r'(kind|type|reason|outcome)!?=~?"([^"]*)"', rule["expr"]):
            assert set(values.split("|")) <= known[label], (name, label, values)


def queries() -> dict[str, str]:
    """Every query of the dashboard as Grafana sends it, and of the alerts, by where it stands."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = {
        f"{p['title']} {t['refId']}": t["expr"]
        .replace("$__rate_interval", "4s")
        .replace("$namespace", ".*")
        for p in panels
        for t in p.get("targets", [])
    }
    return found | {name: rule["expr"] for name, rule in ALERTS.items()}


class Exported(BaseHTTPRequestHandler):
    """`/metrics` of operator, router and worker in one."""

    def do_GET(self) -> None:
        body = exported_metrics.text().encode()
        self.send_response(200)
        self.send_header("content-type", "text/plain; version=0.0.4")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def prometheus(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus that has scraped at least twice; its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Exported)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folder = tmp_path_factory.mktemp("prometheus")
    target = f"127.0.0.1:{server.server_port}"
    labels = {"namespace": "n", "router": "x", "pod": "p"}
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {
                "job_name": "tandem",
                "honor_labels": True,
                "static_configs": [{"targets": [target], "labels": labels}],
            }
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [
                tools / "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        eventually_in_another_process(
            lambda: _scraped(url), told=(folder / "log").read_text, process=process
        )
        yield url
    finally:
        process.terminate()
        process.wait(timeout=20)
        server.shutdown()
        server.server_close()


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


def ask(url: str, path: str, **query: str) -> Any:
    """The data of an answer of Prometheus' API."""
    asked = f"{url}{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(asked, timeout=10) as reply:
        answer = json.load(reply)
    assert answer["status"] == "success", answer
    return answer["data"]


def _scraped(url: str) -> bool:
    try:
        found = ask(url, "/api/v1/query", query="count_over_time(up[1h])")["result"]
    except OSError:
        return False
    return bool(found) and float(found[0]["value"][1]) >= 3


def test_a_prometheus_reads_every_query_and_knows_every_metric_in_it(prometheus: str) -> None:
    """Read by the parser and evaluator themselves; names are those that were scraped."""
    known = set(ask(prometheus, "/api/v1/metadata"))
    for where, query in queries().items():
        ask(prometheus, "/api/v1/query", query=query)
        for name in re.findall(r"(?:tandem_|vllm:)[a-z0-9_]+", query):
            family = re.sub(r"_(bucket|sum|count)$", "", name)
            assert {name, family} & known, f"{where}: nobody exports {name}"
    empty = [
        where
        for where, query in queries().items()
        if where not in ALERTS and not ask(prometheus, "/api/v1/query", query=query)["result"]
    ]
    assert empty == []


async def test_a_prometheus_answers_the_queries_of_a_policy(prometheus: str) -> None:
    """As the control loop asks them: names filled in, one number each, or why there is none."""
    router = Router.model_validate(
        {
            "metadata": {"name": "x", "namespace": "n"},
            "spec": {"tiers": [{"name": "large", "modelRef": {"name": "m"}}]},
        }
    )
    known = ask(prometheus, "/api/v1/query", query="sum(tandem_waiting_requests)")["result"]

    def policy(query: str) -> AutoscalingPolicySpec:
        role = {"signals": [{"name": "Prometheus", "target": "10"}]}
        return AutoscalingPolicySpec.model_validate({"query": query, "decode": role})

    async def said(query: str) -> float | str:
        pool = ("large", "decode")
        return (await queried(prometheus, router, policy(query), [pool]))[pool]

    of_this = 'sum(tandem_waiting_requests{namespace="$namespace", router="$router"})'
    assert await said(of_this) == float(known[0]["value"][1])
    assert await said("scalar(vector(45))") == 45.0
    assert await said('absent(nothing{tier="$tier"}) + 6') == 7.0
    assert "series instead of one" in str(await said("up * on() group_right() nothing"))
    assert "parse error" in str(await said("sum("))


def test_a_prometheus_evaluates_every_rule(prometheus: str) -> None:
    groups = ask(prometheus, "/api/v1/rules")["groups"]
    rules = {r["name"]: r for group in groups for r in group["rules"]}

    assert set(rules) == set(ALERTS)
    assert {r["health"] for r in rules.values()} <= {"ok", "unknown"}
    assert {r.get("lastError", "") for r in rules.values()} == {""}
