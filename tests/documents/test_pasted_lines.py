"""What a command tells its user to paste into the YAML is taken there."""

from __future__ import annotations

import re
from pathlib import Path

from document_kit import ROOT
from tandem_operator.manifests import load_text
from tandem_router.predictor.cli import _to_plug_in

ROUTER = """\
apiVersion: tandem.dev/v1alpha1
kind: Router
metadata: {name: chat}
spec:
  tiers: [{name: small, modelRef: {name: small}}, {name: large, modelRef: {name: large}}]
"""


def test_the_line_of_a_floor() -> None:
    source = ROOT / "router" / "tandem_router" / "predictor" / "evaluation" / "pair_report.py"
    line = re.search(r'"yaml": f\'(objective: .+)\',', source.read_text())
    assert line is not None
    pasted = line[1].replace("{{", "{").replace("}}", "}").replace("{floor:g}", "0.95")

    plugged = '  predictor: {type: Learned, artifact: "configmap://a/b"}\n'
    assert load_text(f"{ROUTER}{plugged}  {pasted}\n", "router.yaml")


def test_the_lines_that_plug_an_artifact_in(tmp_path: Path) -> None:
    lines = _to_plug_in(tmp_path / "my-pair.tandem", 1000) + _to_plug_in(tmp_path / "p", 2_000_000)

    found = [m for line in lines for m in re.findall(r"predictor: \{.*?\}", line)]
    assert len(found) == 4
    for pasted in found:
        text = pasted.replace("CLAIM", "claim")
        assert load_text(f"{ROUTER}  {text}\n", "router.yaml")
