"""``tandem serve``: one command, one OpenAI-compatible server for one model."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from tandem_worker.cli.worker import serve
from tandem_worker.config import WorkerConfig
from tandem_worker.engine.malloc import keep_freed_memory
from tandem_worker.errors import WorkerError


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "serve",
        help="serve one model on this machine",
        description="Serve one model: an OpenAI-compatible server, without router or Kubernetes.",
    )
    parser.add_argument(
        "weights",
        metavar="MODEL",
        help="a Hugging Face model directory, or hf://ORG/NAME[@REVISION]",
    )
    parser.add_argument(
        "--name", metavar="NAME", help="name of the model (default: the directory's)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on; ::1 works too"
    )
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="port; 0 takes a free one"
    )
    parser.add_argument(
        "--dtype", default="auto", metavar="TYPE", help="auto, float32, bfloat16 or float16"
    )
    parser.add_argument(
        "--max-model-len", type=int, metavar="N", help="longest prompt + answer, tokens"
    )
    parser.add_argument(
        "--max-loss",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="by how much lossy weights may raise the perplexity of exact_answers.json",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until interrupted; the exit status."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        weights = _weights(arguments.weights)
        threads = arguments.threads or len(os.sched_getaffinity(0))
        config = WorkerConfig.parse(
            {
                "served_model": arguments.name or weights.name,
                "dtype": arguments.dtype,
                "num_threads": threads,
                "max_model_len": arguments.max_model_len,
                "max_loss": arguments.max_loss,
            },
            source="tandem serve",
        )
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        keep_freed_memory()
        say(f"loading {config.served_model} from {weights} ...")
        return asyncio.run(
            serve(
                config,
                weights,
                host=arguments.host,
                port=arguments.port,
                on_ready=lambda url: say(welcome(config.served_model, url)),
            )
        )
    except WorkerError as error:
        print(f"tandem serve: {error}", file=sys.stderr)
        return 1


def _weights(named: str) -> Path:
    """The folder of what was named, downloaded first where that is elsewhere."""
    if named.startswith("hf://"):
        from tandem_worker.models.download import download

        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = cache / "tandem" / "weights" / named.removeprefix("hf://").replace("/", "--")
        download(named, folder, os.environ, say)
        return folder
    folder = Path(named).resolve()
    if not folder.is_dir():
        raise WorkerError(
            f"{named} is not a directory; name a folder with config.json, tokenizer.json and "
            "safetensors files, or hf://ORG/NAME"
        )
    return folder


def welcome(model: str, url: str) -> str:
    """Where the server is, and a line to try it with."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    quoted = body.replace("'", "'\\''")
    return (
        f"{model} is ready at {url}/v1\n\n"
        f"  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{quoted}'\n"
    )


def say(text: str) -> None:
    """To the user, at once."""
    print(text, flush=True)
