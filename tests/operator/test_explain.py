"""`tandem explain`, completion and --version: what can be asked without a cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tandem_operator.cli import main
from tandem_operator.cli.completion import typed_command
from tandem_operator.cli.explain import complete, find, named, type_of
from tandem_operator.resources import KINDS
from tandem_operator.resources.crds import open_api
from tandem_operator.resources.schema import Schema


def paths(schema: Schema, at: str) -> list[str]:
    """Every field path below a schema."""
    found = []
    for name, child in named(schema).get("properties", {}).items():
        found += [f"{at}.{name}", *paths(child, f"{at}.{name}")]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_explained_and_completed(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    every = paths(open_api(kind), kind.lower())

    assert len(every) > 20
    for path in every:
        _, _, schema = find(path)
        assert path in complete(path[:-1] if "." in path[:-1] else path)
        if path.endswith(("metadata", "apiVersion", "kind")):
            continue
        assert main(["explain", path]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert " ".join(str(schema["description"]).split()) in text
        assert f"<{type_of(schema)}>" in text


def test_a_field_says_its_default_bounds_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "rtr.spec.slo.ttft.percentile"]) == 0
    text = capsys.readouterr().out
    assert "DEFAULT:  95" in text
    assert "- 50 to 99" in text

    assert main(["explain", "routers.spec.budget"]) == 0
    text = capsys.readouterr().out
    assert 'onExhausted   <string>  (default "Downgrade")' in text
    assert "One of Downgrade, Queue, Reject." in text

    assert main(["explain", "router.spec.budget", "--json"]) == 0
    assert "onExhausted" in json.loads(capsys.readouterr().out)["properties"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("router.spec.bugdet", "did you mean budget? it has tiers, "),
        ("rooter.spec", "unknown kind 'rooter'; did you mean router?"),
        ("pods", "pods is Kubernetes' own"),
        ("router.spec.port.x", "router.spec.port has no fields"),
    ],
)
def test_what_does_not_exist_is_said(
    path: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", path]) == 1
    assert said in capsys.readouterr().err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])

    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("tandem ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_is_printed(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    assert "tandem" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "command"),
    [("tandem ", None), ("tandem ge", None), ("tandem get ", "get"), ("tandem get mo", "get")],
)
def test_a_command_is_known_once_it_is_whole(line: str, command: str | None) -> None:
    assert typed_command(line) == command


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("tandem exp", {"explain "}),
        ("tandem get m", {"models "}),
        ("tandem explain router.spec.bud", {"router.spec.budget "}),
        ("tandem up --o", {"--once "}),
    ],
)
def test_the_shell_is_answered(line: str, offered: set[str], tmp_path: object) -> None:
    answer = f"{tmp_path}/answer"
    environment = {
        **os.environ,
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": answer,
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }

    subprocess.run(
        [sys.executable, "-m", "tandem_operator.cli"], env=environment, check=False, timeout=60
    )

    with open(answer) as file:
        assert set(file.read().split("\n")) == offered
