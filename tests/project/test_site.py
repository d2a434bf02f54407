"""The documents build as one site without a warning; who reads them is sent nowhere else."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tandem_router.errors import explanations

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": "", "NO_MKDOCS_2_WARNING": "1"},
    )
    assert result.returncode == 0, f"the documents have broken links:\n{result.stderr[-4000:]}"
    return folder


class Requests(HTMLParser):
    """Collects what a browser fetches for a page: not links, which a person follows."""

    FETCHED = {"img": "src", "script": "src", "iframe": "src", "source": "src", "video": "src"}

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in self.FETCHED and values.get(self.FETCHED[tag]):
            self.found.append(str(values[self.FETCHED[tag]]))
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev", "author"):
            self.found.append(str(values.get("href")))
        if "style" in values:
            self.found += re.findall(r"url\(([^)]+)\)", str(values["style"]))


def test_a_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    elsewhere = []
    for page in pages:
        reader = Requests()
        reader.feed(page.read_text())
        elsewhere += [f"{page.name}: {u}" for u in reader.found if "//" in u]
    for style in site.rglob("*.css"):
        elsewhere += re.findall(
            r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)'\"]+", style.read_text()
        )

    assert len(pages) > 60
    assert elsewhere == []


def test_steps_keep_their_numbers_around_what_stands_between_them(site: Path) -> None:
    assert '<ol start="2">' in (site / "tasks" / "predictor-canary.html").read_text()
    assert '<ol start="3">' in (site / "tasks" / "gateway.html").read_text()


def test_nothing_makes_the_theme_load_a_library_on_demand(site: Path) -> None:
    """The theme fetches mermaid from elsewhere where a page has such a diagram: draw an SVG."""
    assert [p.name for p in site.rglob("*.html") if 'class="mermaid"' in p.read_text()] == []


def test_search_works_from_disk_and_knows_the_words_that_people_look_up(site: Path) -> None:
    index = (site / "search" / "search_index.js").read_text()

    for word in ("InsufficientGPU", "apiKeySecretRef", "maxShare", "tandem_decisions_total"):
        assert word in index
    assert (site / "assets" / "iframe-worker.js").is_file()


#: What people ask, the words they would type for it, the page that has to be among the first three
#: hits, and what stands on it that answers.
QUESTIONS = [
    ("rotate a client's key", "faq.html", "tandem keys revoke"),
    ("why is my Router Degraded?", "faq.html", "tandem get models"),
    ("what does tandem_decisions_total mean", "tasks/monitoring.html", "tandem_decisions_total"),
    ("what was spent yesterday?", "faq.html", "/admin/spend?since="),
    ("quality floor not held", "faq.html", "FloorHeld"),
    ("InsufficientGPU", "tasks/gpus.html", "add nodes, or lower"),
    ("429 too many requests", "faq.html", "request_rate_limit"),
    ("a provider's key has changed", "faq.html", "apiKeySecretRef"),
    ("scale to zero", "tasks/autoscaling.html", "ScaledToZero"),
    ("several router pods with postgres", "tasks/replicas.html", "postgres"),
    ("upgrade without downtime", "tasks/upgrade.html", "helm upgrade"),
    ("fill a claim with weights", "getting-started.html", "kubectl cp"),
    ("grade answers without references", "grading.html", "--judge"),
    ("export labels for training", "reference/commands.html", "tandem labels export"),
    ("first request to the cluster", "getting-started.html", "port-forward"),
    ("try it without changing answers", "faq.html", "routing: Advise"),
    ("worker out of memory", "faq.html", "kvCacheMemory"),
    ("limit dollars per hour of a team", "tasks/teams.html", "usdPerHour"),
    ("logs of a worker", "faq.html", "tandem logs"),
    ("change the floor while it runs", "faq.html", "within seconds"),
    ("which tier answered a request", "faq.html", "x-tandem-tier"),
    ("where do dollars come from", "tasks/budget.html", "usdPer1MInputTokens"),
    ("prefill and decode apart", "concepts.html", "tandem plan"),
    ("uninstall everything", "faq.html", "helm uninstall"),
    ("which edits restart router pods", "faq.html", "another ConfigMap's predictor"),
    ("delete a Model used by a Router", "faq.html", "takes the Model up again"),
    ("StorageClass does not exist", "faq.html", "names the claim, the class"),
    ("rollout stuck no free GPU", "faq.html", "WaitingForRoom"),
    ("TLS certificate for the endpoint", "faq.html", "clusterIssuer"),
    ("pull secret for images", "faq.html", "images.pullSecrets"),
    ("how do I see traces", "faq.html", "OTEL_EXPORTER_OTLP_ENDPOINT"),
    ("Prometheus cannot scrape workers", "faq.html", "networkPolicies.metricsFrom"),
    ("two operators in one cluster", "faq.html", "OtherRelease"),
    ("node drain loses requests", "faq.html", "carries the stream on"),
    ("run behind a proxy", "faq.html", "HTTPS_PROXY"),
    ("AMD GPUs", "tasks/gpus.html", "amd.com/gpu"),
]


def test_what_people_ask_is_among_the_first_three_hits(site: Path) -> None:
    """By the search of the site itself, run as a browser's worker runs it."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("the site's search is JavaScript: needs node")
    script = str(Path(__file__).with_name("site_search.mjs"))
    asked = json.dumps([words for words, _, _ in QUESTIONS])
    done = subprocess.run(
        [node, script, str(site)], input=asked, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lost = []
    for (words, page, answer), pages in zip(QUESTIONS, json.loads(done.stdout), strict=True):
        first = [parts[0].split("#")[0] for parts in pages[:3]]
        if page not in first:
            lost.append(f"{words!r} finds {first}, not {page}")
        if answer not in html.unescape(re.sub(r"<[^>]+>", "", (site / page).read_text())):
            lost.append(f"{page} does not say {answer!r}")

    assert len(QUESTIONS) >= 20
    assert lost == []


def test_what_is_copied_of_a_console_block_can_be_pasted(site: Path) -> None:
    """Prompts and printed lines have classes of their own, and the style leaves them out."""
    page, style = (site / "getting-started.html").read_text(), (site / "site.css").read_text()

    assert '<span class="gp">$ </span>' in page
    assert "[data-md-copying] .gp, [data-md-copying] .go { display: none; }" in style
    bundle = next((site / "assets" / "javascripts").glob("bundle.*.min.js")).read_text()
    assert "data-md-copying" in bundle


def test_every_code_that_a_server_explains_has_its_place_on_the_page(site: Path) -> None:
    page = (site / "troubleshooting.html").read_text()

    assert len(explanations()) > 50
    assert [c for c in explanations() if f'id="error-{c}"' not in page] == []


def test_every_document_is_reached_from_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text()
    pages = [p.relative_to(site).as_posix() for p in site.rglob("*.html") if p.name != "404.html"]

    assert [p for p in pages if f'href="{p}"' not in home and p != "index.html"] == []
