"""`tandem keys`: mint, list, limit and revoke API keys of a Router while it runs.

On the running local cluster the Router is found by name. Anywhere else `--url` names its endpoint
(for instance behind `kubectl port-forward`) and `--token-file` holds the peer token of its
namespace (Secret tandem-peer-token).
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tandem_operator.cli.errors import CommandError
from tandem_operator.resources.base import Object

LIMITS = {
    "max_concurrency": (int, "N", "requests at the same time"),
    "requests_per_minute": (float, "N", "requests in a minute"),
    "tokens_per_minute": (float, "N", "prompt plus output tokens in a minute"),
    "usd_per_hour": (float, "USD", "US dollars in an hour"),
}
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def register(subparsers: Any) -> None:
    """Add the command to the parser."""
    text = "mint, list, limit and revoke API keys of a Router"
    keys = subparsers.add_parser("keys", help=text, description=__doc__.split("\n\n")[0])
    actions = keys.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = action(actions, "list", "all keys, never their text")
    create = action(actions, "create", "mint a key; it is shown once")
    create.add_argument("tenant", help="whose; one of spec.tenants")
    limit = action(actions, "limit", "change the limits of a key; 0 takes one away")
    limit.add_argument("id", help="as `tandem keys list` shows it")
    revoke = action(actions, "revoke", "end a key for good")
    revoke.add_argument("id", help="as `tandem keys list` shows it")
    for parser in (create, limit):
        for name, (kind, metavar, what) in LIMITS.items():
            parser.add_argument(
                "--" + name.replace("_", "-"), type=kind, metavar=metavar, help=f"most {what}"
            )
        parser.add_argument("--expires", type=_seconds, metavar="TIME", help="such as 12h or 30d")
    for parser, run in (
        (listing, _list),
        (create, _create),
        (limit, _limit),
        (revoke, _revoke),
    ):
        add_router_options(parser)
        parser.add_argument("--json", action="store_true", help="print what the router says")
        parser.set_defaults(run=run)


def action(actions: Any, name: str, text: str) -> argparse.ArgumentParser:
    """One action of a command, with its sentence."""
    parser: argparse.ArgumentParser = actions.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    return parser


def add_router_options(parser: argparse.ArgumentParser) -> None:
    """Which Router is asked."""
    parser.add_argument("--router", metavar="NAME", help="which, when there are several")
    parser.add_argument("--cluster", metavar="NAME", help="which, when several are running")
    parser.add_argument(
        "--url", metavar="URL", help="endpoint of a Router elsewhere, http://HOST:PORT"
    )
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="with --url: holds the peer token"
    )


def _seconds(text: str) -> float:
    try:
        value = float(text[:-1]) * UNITS[text[-1:]]
    except (KeyError, ValueError):
        value = 0.0
    if not 0 < value < 3.2e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; use a number and s, m, h or d")
    return value


def _list(args: argparse.Namespace) -> int:
    from tandem_operator.cli import table

    answer = call(args, "GET", "/admin/keys")
    if args.json:
        sys.stdout.write(json.dumps(answer["keys"], indent=2) + "\n")
        return 0
    rows = [["ID", "TENANT", "STATE", "CREATED", "LIMITS"]]
    for key in answer["keys"]:
        created = time.strftime("%Y-%m-%d %H:%M", time.gmtime(key["created"]))
        limits = ", ".join(f"{name} {key[name]:g}" for name in LIMITS if key.get(name) is not None)
        rows.append(
            [
                key["id"],
                key["tenant"],
                _state(key),
                created if key["created"] else "in the resource",
                limits or "its tenant's",
            ]
        )
    sys.stdout.write("\n".join(table.render(rows)) + "\n")
    if not answer["store"]["durable"]:
        sys.stderr.write("these keys are gone with the router: it has no store (spec.store)\n")
    return 0


def _state(key: Object) -> str:
    if key.get("revoked") is not None:
        return "revoked"
    expires = key.get("expires")
    if expires is None:
        return "works"
    left = expires - time.time()
    return "expired" if left <= 0 else f"works, {left / 3600:.3g} h left"


def _create(args: argparse.Namespace) -> int:
    fields: Object = {name: getattr(args, name) for name in LIMITS if getattr(args, name)}
    if args.expires is not None:
        fields["expires_in_s"] = args.expires
    answer = call(args, "POST", "/admin/keys", {"tenant": args.tenant, **fields})
    _tell(args, answer, f"id   {answer['id']}\nkey  {answer['key']}")
    sys.stderr.write("the key is shown this once; keep it\n")
    return 0


def _limit(args: argparse.Namespace) -> int:
    fields: Object = {
        name: value or None for name in LIMITS if (value := getattr(args, name)) is not None
    }
    if args.expires is not None:
        fields["expires_in_s"] = args.expires
    if not fields:
        raise CommandError("name a limit, such as --usd-per-hour 2; 0 takes one away")
    answer = call(args, "PATCH", f"/admin/keys/{_id(args)}", fields)
    _tell(args, answer, f"key {args.id} limited")
    return 0


def _revoke(args: argparse.Namespace) -> int:
    answer = call(args, "DELETE", f"/admin/keys/{_id(args)}")
    _tell(args, answer, f"key {answer['id']} of {answer['tenant']} revoked")
    return 0


def _tell(args: argparse.Namespace, answer: Object, text: str) -> None:
    sys.stdout.write((json.dumps(answer, indent=2) if args.json else text) + "\n")


def _id(args: argparse.Namespace) -> str:
    if not args.id.isalnum():
        raise CommandError(f"{args.id!r} is no id of a key; `tandem keys list` shows them")
    return str(args.id)


def call(args: argparse.Namespace, method: str, path: str, body: Object | None = None) -> Object:
    """What the router answers. Raises CommandError in its words."""
    import httpx

    url, token = _router(args)
    try:
        # Routers are near; a proxy of this shell does not lead to them.
        with httpx.Client(trust_env=False, timeout=10.0) as client:
            reply = client.request(
                method, url + path, json=body, headers={"x-tandem-peer-token": token}
            )
    except httpx.HTTPError as error:
        raise CommandError(f"{url} is not reached: {error}") from error
    try:
        answer = reply.json()
    except ValueError:
        answer = {}
    if reply.status_code >= 400 or not isinstance(answer, dict):
        refusal = answer.get("error") if isinstance(answer, dict) else None
        plain = f"answers {reply.status_code}"
        said = refusal.get("message") if isinstance(refusal, dict) else plain
        raise CommandError(f"{url}: {said}")
    return answer


def _router(args: argparse.Namespace) -> tuple[str, str]:
    """(URL, peer token) of the Router that the arguments mean."""
    if args.url is not None:
        if args.token_file is None:
            token = os.environ.get("TANDEM_PEER_TOKEN", "")
        else:
            try:
                token = args.token_file.read_text().strip()
            except OSError as error:
                raise CommandError(f"{args.token_file}: {error.strerror}") from error
        if not token:
            raise CommandError("--url needs --token-file (or TANDEM_PEER_TOKEN): the peer token")
        return args.url.rstrip("/").removesuffix("/v1"), token
    from tandem_operator.local.control_socket import ControlError, ask
    from tandem_operator.local.state_dir import RunDirError, find_cluster

    try:
        socket = find_cluster(args.cluster).socket
        endpoints: dict[str, str] = ask(socket, {"op": "info"})["endpoints"]
        secrets = ask(socket, {"op": "list", "kinds": ["Secret"]})["objects"]
    except (RunDirError, ControlError) as error:
        raise CommandError(f"{error}; or name one elsewhere with --url") from error
    names = ", ".join(endpoints) or "none"
    if args.router is None and len(endpoints) != 1:
        raise CommandError(f"say which Router with --router; there are {names}")
    name = args.router or next(iter(endpoints))
    if name not in endpoints:
        raise CommandError(f"there is no Router {name!r}; there are {names}")
    for secret in secrets:
        if secret["metadata"]["name"] == "tandem-peer-token":
            data, plain = secret.get("data") or {}, secret.get("stringData") or {}
            token = plain.get("token") or base64.b64decode(data.get("token", "")).decode()
            return endpoints[name].rstrip("/").removesuffix("/v1"), token
    raise CommandError("the cluster has no peer token yet; wait until a router runs")
