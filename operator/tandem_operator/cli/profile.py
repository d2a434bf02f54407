"""`tandem profile URL`: what a running engine's prefill and decode take, fitted and priced."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from tandem_operator.cli.errors import CommandError

# The load that a price per token is told for, unless one says otherwise.
PRICED_BATCH = 16
PRICED_CONTEXT = 1024


def register(subparsers: Any) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "profile",
        help="measure prefill and decode of a running engine",
        description="Measures prefill and decode of a running OpenAI-compatible engine over a "
        "grid, fits a + b*L + c*L^2 and a + b*context + c*batch, and writes the profile that "
        "`tandem simulate`, `tandem plan`, the router's prices and the autoscaler read. Start the "
        "engine with `tandem serve MODEL_DIR`, or name a worker, a vLLM, any endpoint. Nothing "
        "else should use it meanwhile.",
    )
    parser.add_argument("url", help="such as http://127.0.0.1:8000")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the profile here")
    parser.add_argument("--model", metavar="NAME",
                        help="of the model; absent: the first that the server lists")  # fmt: skip
    parser.add_argument(
        "--api-key-env", metavar="NAME", help="variable that holds the bearer token"
    )
    parser.add_argument("--max-context", type=int, metavar="TOKENS",
                        help="longest prompt measured; absent: the server's")  # fmt: skip
    parser.add_argument("--max-batch", type=int, default=16, metavar="N",
                        help="most sequences at a time")  # fmt: skip
    parser.add_argument("--kv-tokens", type=int, metavar="N",
                        help="capacity of its KV cache, if it does not say")  # fmt: skip
    parser.add_argument("--usd-per-hour", type=float, metavar="USD",
                        help="price of one worker: prints dollars per token")  # fmt: skip
    parser.add_argument("--bandwidth-gb-s", type=float, metavar="GB/S",
                        help="of the device's memory: prints the share reached")  # fmt: skip
    parser.add_argument("--weights-gb", type=float, metavar="GB",
                        help="bytes of the weights, for the same")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command; raises CommandError with a sentence."""
    from tandem_operator.profiling.endpoint import EndpointError

    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise CommandError(f"cannot write {arguments.output}: its folder does not exist")
    for name in ("max_batch", "max_context", "kv_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise CommandError(f"--{name.replace('_', '-')} {value} must be at least 1")
    try:
        return asyncio.run(_profile(arguments))
    except EndpointError as error:
        raise CommandError(str(error)) from error


async def _profile(arguments: argparse.Namespace) -> int:
    from tandem_operator.profiling.endpoint import Endpoint
    from tandem_operator.profiling.fit import fit_decode, fit_prefill
    from tandem_operator.profiling.measure import grid, measure

    key = None
    if arguments.api_key_env is not None:
        key = os.environ.get(arguments.api_key_env)
        if not key:
            raise CommandError(f"the variable {arguments.api_key_env} is empty; export the key")
    async with Endpoint(arguments.url, arguments.model, key) as endpoint:
        await endpoint.describe()
        probe = await endpoint.warm_up(" ".join(["red1 sky2 two3 low4 box5 sea6"] * 4))
        engine = await endpoint.describe()  # again: while it loaded it did not know its context
        longest = min(arguments.max_context or engine.max_tokens, engine.max_tokens)
        plan = grid(longest, arguments.max_batch, probe.prompt_tokens / 24.0)
        _say(f"{engine.model} at {endpoint.url}: prompts up to {longest} tokens")
        prefills, decodes = await measure(endpoint.complete, plan, arguments.seed, _say)
    try:
        prefill, decode = fit_prefill(prefills), fit_decode(decodes)
    except ValueError as error:
        raise CommandError(f"not enough was measured: {error}; raise --max-context") from error
    kv_tokens = arguments.kv_tokens or engine.kv_tokens
    lines = [
        f"prefill  {_show(prefill.coefficients)}  off by {prefill.median_error:.1%} (median), "
        f"{prefill.worst_error:.1%} (worst)",
        f"decode   {_show(decode.coefficients)}  off by {decode.median_error:.1%} (median), "
        f"{decode.worst_error:.1%} (worst)",
    ]
    lines += _extras(arguments, prefill.coefficients, decode.coefficients)
    print("\n".join(lines))
    if arguments.output is None:
        return 0
    if kv_tokens is None:
        raise CommandError(
            "the server does not say how many tokens its KV cache holds; --kv-tokens"
        )
    profile = {
        "kind": "tandem-profile",
        "name": engine.model,
        "prefill": list(prefill.coefficients),
        "decode": list(decode.coefficients),
        "kv_tokens": kv_tokens,
        "fit": {
            "prefill_median_error": prefill.median_error,
            "decode_median_error": decode.median_error,
        },
        "measured": {
            "prefill": [[t.prompt_tokens, t.seconds] for t in prefills],
            "decode": [[t.batch, t.context_tokens, t.seconds] for t in decodes],
        },
    }
    arguments.output.write_text(json.dumps(profile, indent=1) + "\n")
    print(
        f"wrote {arguments.output}; use it with `tandem simulate --profile TIER={arguments.output}`"
    )
    return 0


def _extras(
    arguments: argparse.Namespace,
    prefill: tuple[float, float, float],
    decode: tuple[float, float, float],
) -> list[str]:
    from tandem_operator.plan.measured_prices import token_price

    lines = []
    batch, context = min(PRICED_BATCH, arguments.max_batch), PRICED_CONTEXT
    if arguments.max_context is not None:
        context = min(context, arguments.max_context)
    if arguments.usd_per_hour is not None:
        hour = arguments.usd_per_hour
        found = token_price(prefill, decode, hour, hour, batch=batch, context_tokens=context)
        lines.append(
            f"price    ${found.usd_per_1m_input_tokens:.4g} per million input tokens, "
            f"${found.usd_per_1m_output_tokens:.4g} per million output tokens ({batch} at a time, "
            f"{context} tokens each, fully used)"
        )
    if arguments.bandwidth_gb_s is not None and arguments.weights_gb is not None:
        ideal_s = arguments.weights_gb / arguments.bandwidth_gb_s
        lines.append(
            f"roofline a decode step reads the weights in {1000.0 * ideal_s:.3g} ms at best; one "
            f"sequence takes {1000.0 * (decode[0] + decode[2]):.3g} ms: "
            f"{ideal_s / (decode[0] + decode[2]):.0%} of the bandwidth"
        )
    return lines


def _show(numbers: tuple[float, float, float]) -> str:
    return "[" + ", ".join(f"{n:.4g}" for n in numbers) + "] s"


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
