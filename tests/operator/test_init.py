"""`tandem init` writes a YAML that is accepted as it stands, or says what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem_operator.cli import main
from tandem_operator.manifests import load_text

MODELS = Path(__file__).resolve().parents[2] / "examples" / "models"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--small", str(MODELS / "small"), "--large", str(MODELS / "large")],
        ["--small", "Qwen/Qwen3-1.7B", "--large", "vllm:Qwen/Qwen3-32B@main"],
        ["--small", f"vllm:{MODELS / 'small'}", "--large", "https://api.test/v1#big"]
        + ["--large-price", "2.5/10"],
    ],
)
def test_what_is_written_is_accepted(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", *arguments]) == 0

    manifests = load_text(capsys.readouterr().out, "f.yaml")
    assert [m.kind for m in manifests][-1] == "Router"
    tiers = manifests[-1].obj["spec"]["tiers"]
    assert [t["name"] for t in tiers] == ["small", "large"]


def test_a_providers_key_has_its_place_and_a_server_without_one_needs_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As it stands it starts: what `tandem up` needs is in the file, not in kubectl."""
    ends = ["--small", "http://127.0.0.1:9101/v1#mini", "--large", "https://api.test/v1#big"]
    prices = ["--small-price", "0.1/0.4", "--large-price", "2.5/10"]
    assert main(["init", *ends, *prices]) == 0

    secret, router = (m.obj for m in load_text(capsys.readouterr().out, "f.yaml"))
    small, large = (t["external"] for t in router["spec"]["tiers"])
    assert "apiKeySecretRef" not in small
    assert large["apiKeySecretRef"]["name"] == secret["metadata"]["name"]
    assert secret["metadata"]["labels"] == {"tandem.dev/usable-by": "routers"}
    assert list(secret["stringData"]) == ["api-key"]


@pytest.mark.parametrize(
    ("large", "sentence"),
    [
        ("https://api.test/v1", "names no model"),
        ("https://api.test/v1#big", "add --large-price IN/OUT"),
        ("what is this", "is neither of"),
        (str(MODELS), "has no config.json"),
    ],
)
def test_what_is_missing_is_said(
    large: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "--small", "a/b", "--large", large]) == 1
    assert sentence in capsys.readouterr().err


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "chat.yaml"
    command = ["init", "--small", "a/b", "--large", "c/d", "-o", str(target)]

    assert [main(command), main(command)] == [0, 1]
    assert "exists" in capsys.readouterr().err
