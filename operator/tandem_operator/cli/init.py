"""`tandem init`: a commented YAML for a small and a large model, wherever they are."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem_operator.cli.errors import CommandError
from tandem_operator.manifests import ManifestError, load_text

VLLM_IMAGE = "vllm/vllm-openai:v0.32.0"
FORMS = (
    "a folder with config.json, a hub name such as Qwen/Qwen3-8B, vllm:FOLDER-OR-NAME, or "
    "https://HOST/v1#MODEL for an external endpoint"
)


def register(subparsers: Any) -> None:
    """Add the command to the parser."""
    text = "write a commented YAML for a small and a large model"
    parser = subparsers.add_parser(
        "init", help=text, description=f"{text[0].upper()}{text[1:]}. Each model is {FORMS}."
    )
    for tier in ("small", "large"):
        parser.add_argument(f"--{tier}", required=True, metavar="MODEL", help=FORMS)
        parser.add_argument(
            f"--{tier}-price",
            metavar="IN/OUT",
            help="dollars per million input and output tokens, such as 0.15/0.60; an external "
            "endpoint needs them",
        )
    parser.add_argument(
        "--image", default=VLLM_IMAGE, metavar="IMAGE", help=f"of vllm: ({VLLM_IMAGE})"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="where to write; stdout when absent")
    parser.set_defaults(run=_init)


@dataclass(frozen=True)
class Source:
    """Where one tier's answers come from."""

    tier: str
    weights: str | None
    vllm: bool
    url: str = ""
    model: str = ""

    @property
    def keyed(self) -> bool:
        """Whether a key may be sent there: it travels over https only."""
        return self.url.startswith("https://")


def source_of(tier: str, text: str) -> Source:
    """Read what --small or --large names. Raises CommandError."""
    if text.startswith(("http://", "https://")):
        url, _, model = text.partition("#")
        if not model:
            raise CommandError(
                f"--{tier} {text} names no model; add it behind #, as in {url.rstrip('/')}#gpt-5"
            )
        return Source(tier, None, False, url.rstrip("/"), model)
    vllm, rest = text.startswith("vllm:"), text.removeprefix("vllm:")
    folder = Path(rest).expanduser()
    if (folder / "config.json").is_file():
        return Source(tier, f"file://{folder.resolve()}", vllm)
    if folder.is_dir():
        raise CommandError(f"--{tier} {text}: the folder has no config.json; name {FORMS}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", rest) and not rest.startswith("."):
        return Source(tier, f"hf://{rest}", vllm)
    if re.match(r"(hf|s3|pvc|image|file)://", rest):
        return Source(tier, rest, vllm)
    raise CommandError(f"--{tier} {text} is neither of: {FORMS}")


def _prices(tier: str, text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]{1,6})?)/([0-9]+(?:\.[0-9]{1,6})?)", text)
    if found is None:
        raise CommandError(f"--{tier}-price {text} is not IN/OUT, such as 0.15/0.60")
    return found[1], found[2]


def _model(source: Source, image: str) -> str:
    lines = [
        "apiVersion: tandem.dev/v1alpha1",
        "kind: Model",
        f"metadata: {{name: {source.tier}}}",
        "spec:",
        f'  weights: {{source: "{source.weights}"}}',
    ]
    if source.vllm:
        lines += [
            f"  image: {image}",
            "  engine:",
            "    type: VLLM",
            "    args: {}                # vLLM's own flags, such as {quantization: fp8}",
        ]
    lines += [
        "  # gpus: 0 computes on the CPU; usdPerHour is what one worker costs, for budgets.",
        '  unified: {replicas: 1, gpus: 0, usdPerHour: "1"}',
        "---",
    ]
    return "\n".join(lines)


def _secret_name(source: Source) -> str:
    return f"{source.tier}-api-key"


def _secret(source: Source) -> str:
    name = _secret_name(source)
    return "\n".join(
        [
            f"# The key of {source.url}. On a cluster rather, so that it is in no file:",
            f"# kubectl create secret generic {name} --from-literal=api-key=..., then",
            f"# kubectl label secret {name} tandem.dev/usable-by=routers",
            "apiVersion: v1",
            "kind: Secret",
            "metadata:",
            f"  name: {name}",
            "  labels: {tandem.dev/usable-by: routers}",
            "stringData: {api-key: put-yours-here}",
            "---",
        ]
    )


def _tier(source: Source, prices: tuple[str, str] | None) -> list[str]:
    if source.weights is not None:
        lines = [f"  - name: {source.tier}", f"    modelRef: {{name: {source.tier}}}"]
        if prices:
            lines += [
                f'    usdPer1MInputTokens: "{prices[0]}"',
                f'    usdPer1MOutputTokens: "{prices[1]}"',
            ]
        return lines
    if prices is None:
        raise CommandError(
            f"an external endpoint has a price per token; add --{source.tier}-price IN/OUT"
        )
    key = f"apiKeySecretRef: {{name: {_secret_name(source)}}}"
    return [
        f"  - name: {source.tier}",
        "    external:",
        f"      url: {source.url}",
        f'      model: "{source.model}"',
        f"      {key}"
        if source.keyed
        else f"      # {key}    # if it wants a key, which travels over https only",
        f'      usdPer1MInputTokens: "{prices[0]}"',
        f'      usdPer1MOutputTokens: "{prices[1]}"',
    ]


def text_of(sources: list[Source], prices: dict[str, tuple[str, str] | None], image: str) -> str:
    """The YAML."""
    models = [_model(s, image) for s in sources if s.weights is not None]
    models += [_secret(s) for s in sources if s.keyed]
    tiers = [line for s in sources for line in _tier(s, prices[s.tier])]
    router = [
        "apiVersion: tandem.dev/v1alpha1",
        "kind: Router",
        "metadata: {name: chat}",
        "spec:",
        "  tiers:",
        *tiers,
        "  fallbackTier: large",
        "  # Until there are measured outcomes: long prompts go to the large tier. Then:",
        "  #   tandem grade questions.csv --router http://127.0.0.1:8000 -o graded.jsonl.gz",
        "  #   tandem train graded.jsonl.gz -o predictor --max-bytes 900000",
        "  # and instead of the next line:",
        '  #   predictor: {type: Learned, artifact: "file://./predictor"}',
        '  #   objective: {qualityFloor: "0.95"}',
        "  predictor: {type: Length}",
        "  # slo: {ttft: {target: 500ms}, tpot: {target: 50ms}}",
        '  # budget: {usdPerHour: "10", onExhausted: Downgrade}',
    ]
    return "\n".join([*models, *router]) + "\n"


def _init(args: argparse.Namespace) -> int:
    sources = [source_of(tier, getattr(args, tier)) for tier in ("small", "large")]
    prices = {tier: _prices(tier, getattr(args, f"{tier}_price")) for tier in ("small", "large")}
    text = text_of(sources, prices, args.image)
    try:
        load_text(text, args.output or "init.yaml")
    except ManifestError as error:
        raise CommandError(f"these models do not make a usable YAML\n{error}") from error
    if args.output is None:
        sys.stdout.write(text)
        return 0
    path = Path(args.output)
    if path.exists():
        raise CommandError(f"{path} exists; remove it, or choose another name with -o")
    path.write_text(text)
    first = " put your key into its Secret, then" if any(s.keyed for s in sources) else ""
    sys.stdout.write(f"wrote {path}; next:{first} tandem up {path}, or kubectl apply -f {path}\n")
    return 0
