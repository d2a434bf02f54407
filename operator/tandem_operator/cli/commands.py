"""Arguments of the commands that run and talk to a local cluster; work is imported when used."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tandem_operator.cli import completion
from tandem_operator.cli.errors import CommandError
from tandem_operator.cli.kinds import MAIN_KINDS, kind_of, kinds_of
from tandem_operator.resources.base import Object


def register(subparsers: Any) -> None:
    """Add the commands to the parser."""
    up = _add(subparsers, "up", "run custom resources on this machine until Ctrl-C", _up)
    up.add_argument("paths", nargs="+", metavar="FILE|DIR", help="YAML as kubectl apply takes it")
    up.add_argument(
        "--port", type=port_number, metavar="N", help="port of the endpoint (default 8000)"
    )
    up.add_argument("--once", action="store_true", help="exit with 0 as soon as all is ready")
    up.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="with --once: give up after S"
    )
    up.add_argument("--cluster", metavar="NAME", help="name for other commands to find it")
    up.add_argument(
        "--prometheus", default="", metavar="URL",
        help="who answers the queries of AutoscalingPolicies",
    )  # fmt: skip
    up.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="run this command for an image, such as tandem/worker='python my_worker.py', or for "
        "what pods call by name, such as vllm=/opt/vllm/bin/vllm",
    )

    get = _add(subparsers, "get", "list resources of the running cluster", _get)
    _kind(get, nargs="?", default="", help="models, routers, workerpools, pods, all; or a,b")
    _name(get, help="one object")
    get.add_argument(
        "-o", "--output", choices=["table", "yaml", "json"], default="table", help="form"
    )
    get.add_argument("--json", dest="output", action="store_const", const="json", help="-o json")
    get.add_argument("-w", "--watch", action="store_true", help="go on with every change")

    describe = _add(
        subparsers, "describe", "show one resource with conditions and events", _describe
    )
    _kind(describe, help="a kind, or KIND/NAME")
    _name(describe)
    describe.add_argument(
        "--json", action="store_true", help="print object, pods and events as JSON"
    )

    logs = _add(subparsers, "logs", "show what a pod wrote", _logs)
    _completed(logs.add_argument("name", help="a pod, pool, Model or Router"), completion.log_names)
    logs.add_argument("-c", "--container", metavar="NAME", help="of the pod, such as fetch-weights")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until Ctrl-C")
    logs.add_argument("--tail", type=int, default=-1, metavar="N", help="only the last N lines")

    apply = _add(subparsers, "apply", "bring changed YAML into the running cluster", _apply)
    apply.add_argument("paths", nargs="*", metavar="FILE|DIR", help="YAML files or folders")
    _files(apply)
    apply.add_argument("--dry-run", action="store_true", help="only check the YAML")

    delete = _add(subparsers, "delete", "delete resources from the running cluster", _delete)
    _kind(delete, nargs="?", help="a kind, or KIND/NAME")
    _name(delete)
    _files(delete)

    scale = _add(subparsers, "scale", "set the number of workers of a pool", _scale)
    _kind(scale, help="workerpool, model (of one pool) or router, or KIND/NAME")
    _name(scale)
    scale.add_argument("--replicas", type=int, required=True, metavar="N", help="how many")

    events = _add(subparsers, "events", "show what happened in the running cluster", _events)
    events.add_argument("-w", "--watch", action="store_true", help="go on with every event")
    events.add_argument("--json", action="store_true", help="print them as JSON")

    for parser in (get, describe, logs, apply, delete, scale, events):
        parser.add_argument("--cluster", metavar="NAME", help="which, when several are running")


def _completed(action: argparse.Action, completer: Any) -> None:
    action.completer = completer  # type: ignore[attr-defined]


def _files(parser: argparse.ArgumentParser) -> None:
    """Add -f, as kubectl has it."""
    parser.add_argument(
        "-f",
        "--filename",
        action="append",
        default=[],
        metavar="FILE|DIR",
        help="the same, as kubectl takes it; may be given again",
    )


def _kind(parser: argparse.ArgumentParser, **options: Any) -> None:
    _completed(parser.add_argument("kind", **options), completion.kinds)


def _name(parser: argparse.ArgumentParser, help: str = "the object's name") -> None:
    _completed(parser.add_argument("name", nargs="?", help=help), completion.names)


def port_number(text: str) -> int:
    """A TCP port from an argument. Raises ArgumentTypeError for anything but 1 to 65535."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; use a number from 1 to 65535")
    return int(text)


def _add(subparsers: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    parser.set_defaults(run=run)
    return parser


def _up(args: argparse.Namespace) -> int:
    from tandem_operator.cli.up import up

    return up(args)


def _socket(args: argparse.Namespace) -> str:
    from tandem_operator.local.state_dir import RunDirError, find_cluster

    try:
        return find_cluster(args.cluster).socket
    except RunDirError as error:
        raise CommandError(str(error)) from error


def _ask(args: argparse.Namespace, request: Object) -> Object:
    from tandem_operator.local.control_socket import ControlError, ask

    try:
        return ask(_socket(args), request)
    except ControlError as error:
        raise CommandError(str(error)) from error


def _stream(args: argparse.Namespace, request: Object) -> Iterator[Object]:
    from tandem_operator.local.control_socket import ControlError, stream

    try:
        yield from stream(_socket(args), request)
    except ControlError as error:
        raise CommandError(str(error)) from error


def _load(paths: list[str]) -> list[Object]:
    from tandem_operator.manifests import ManifestError, load_paths

    if not paths:
        raise CommandError("name a file or folder with YAML")
    try:
        return [m.obj for m in load_paths(paths)]
    except ManifestError as error:
        raise CommandError(f"the YAML cannot be used\n{error}") from error


def _split(kind: str, name: str | None) -> tuple[str, str | None]:
    if name is None and "/" in kind:
        kind, _, name = kind.partition("/")
    return kind, name


def _get(args: argparse.Namespace) -> int:
    from tandem_operator.cli import table

    word, name = _split(args.kind, args.name)
    kinds = kinds_of(word) or MAIN_KINDS
    if args.watch:
        return _watch(args, kinds, name)
    objects = _ask(args, {"op": "list", "kinds": kinds})["objects"]
    if name is not None:
        there = ", ".join(o["metadata"]["name"] for o in objects) or "none"
        objects = [o for o in objects if o["metadata"]["name"] == name]
        if not objects:
            raise CommandError(f"{'/'.join(kinds).lower()} {name!r} not found; there are: {there}")
    if args.output != "table":
        value: Any = objects[0] if name is not None and len(objects) == 1 else _as_list(objects)
        sys.stdout.write(_dump(value, args.output))
        return 0
    if not objects:
        sys.stderr.write("nothing found\n")
    blocks = []
    for kind in kinds:
        rows = [table.row(kind, o) for o in objects if o["kind"] == kind]
        if rows:
            if len(kinds) > 1:
                rows = [[f"{kind.lower()}/{r[0]}", *r[1:]] for r in rows]
            blocks.append("\n".join(table.render([table.header(kind), *rows])) + "\n")
    sys.stdout.write("\n".join(blocks))
    return 0


def _as_list(objects: list[Object]) -> Object:
    return {"apiVersion": "v1", "kind": "List", "items": objects}


def _dump(value: Any, form: str) -> str:
    if form == "json":
        return json.dumps(value, indent=2) + "\n"
    import yaml

    return str(yaml.safe_dump(value, sort_keys=False, width=100))


def _watch(args: argparse.Namespace, kinds: list[str], name: str | None) -> int:
    from tandem_operator.cli import table

    widths: dict[str, list[int]] = {}
    last: dict[tuple[str, str], list[str]] = {}
    for answer in _stream(args, {"op": "watch", "kinds": kinds}):
        obj = answer["object"]
        kind, own = obj["kind"], obj["metadata"]["name"]
        if name is not None and own != name:
            continue
        cells = table.row(kind, obj)
        if answer["type"] == "DELETED":
            cells.append("deleted")
        elif last.get((kind, own), [""])[:-1] == cells[:-1]:
            continue  # nothing that the table shows has changed
        last[(kind, own)] = cells
        rows = [cells]
        if len(kinds) > 1:
            cells = [f"{kind.lower()}/{cells[0]}", *cells[1:]]
            rows = [cells]
        if kind not in widths:
            widths[kind] = []
            rows = [table.header(kind), cells]
        sys.stdout.write("\n".join(table.render(rows, widths[kind])) + "\n")
        sys.stdout.flush()
    return 0


def _describe(args: argparse.Namespace) -> int:
    from tandem_operator.cli import table

    word, name = _split(args.kind, args.name)
    if name is None:
        raise CommandError("say what to describe: KIND NAME, such as router chat")
    kinds = kind_of(word)
    answer = _ask(args, {"op": "list", "kinds": [*kinds, "Event", "Pod"]})["objects"]
    found = [o for o in answer if o["kind"] in kinds and o["metadata"]["name"] == name]
    if not found:
        there = ", ".join(o["metadata"]["name"] for o in answer if o["kind"] in kinds) or "none"
        raise CommandError(f"{word} {name!r} not found; there are: {there}")
    obj = found[0]
    pods = [o for o in answer if o["kind"] == "Pod" and _owned_by(o, obj)]
    events = [
        o
        for o in answer
        if o["kind"] == "Event" and o["involvedObject"].get("uid") == obj["metadata"]["uid"]
    ]
    if args.json:
        sys.stdout.write(_dump({"object": obj, "pods": pods, "events": events}, "json"))
        return 0
    out = [f"Name:     {name}", f"Kind:     {obj['kind']}"]
    out.append(f"Created:  {obj['metadata']['creationTimestamp']}")
    out.append("Spec:\n" + _indent(_dump(obj.get("spec") or {}, "yaml")))
    status = dict(obj.get("status") or {})
    conditions = status.pop("conditions", [])
    if conditions:
        rows = [["TYPE", "STATUS", "REASON", "MESSAGE"]]
        for c in conditions:
            rows.append([c["type"], c["status"], c.get("reason", ""), c.get("message", "")])
        out.append("Conditions:\n" + _indent("\n".join(table.render(rows))))
        out.append(f"  a word of REASON is explained by `tandem explain {rows[-1][2]}`")
    if status:
        out.append("Status:\n" + _indent(_dump(status, "yaml")))
    if pods:
        rows = [table.header("Pod"), *(table.row("Pod", p) for p in pods)]
        out.append("Pods:\n" + _indent("\n".join(table.render(rows))))
    if events:
        rows = [["AGE", "TYPE", "REASON", "MESSAGE"]]
        for e in events:
            since = table.age(e["lastTimestamp"])
            since += f" (x{e['count']})" if e["count"] > 1 else ""
            rows.append([since, e["type"], e["reason"], e["message"]])
        out.append("Events:\n" + _indent("\n".join(table.render(rows))))
    sys.stdout.write("\n".join(out) + "\n")
    return 0


def _owned_by(pod: Object, obj: Object) -> bool:
    from tandem_operator.plan.objects import MODEL_LABEL, ROUTER_LABEL

    label = {"Model": MODEL_LABEL, "Router": ROUTER_LABEL}.get(obj["kind"])
    labels = pod["metadata"].get("labels") or {}
    return label is not None and labels.get(label) == obj["metadata"]["name"]


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.rstrip().splitlines())


def _logs(args: argparse.Namespace) -> int:
    request = {"op": "log", "name": args.name, "container": args.container}
    path = Path(_ask(args, request)["path"])
    try:
        with path.open("rb") as log:
            data = log.read()
            if args.tail >= 0:
                lines = data.splitlines(keepends=True)
                data = b"".join(lines[len(lines) - args.tail :] if args.tail else [])
            sys.stdout.write(data.decode("utf-8", "replace"))
            sys.stdout.flush()
            while args.follow and path.exists():
                if more := log.read():
                    sys.stdout.write(more.decode("utf-8", "replace"))
                    sys.stdout.flush()
                elif os.stat(path).st_size < log.tell():
                    log.seek(0)  # rotated
                else:
                    time.sleep(0.2)
    except OSError as error:
        raise CommandError(f"nothing was logged yet ({error.strerror})") from error
    return 0


def _print_results(answer: Object) -> int:
    for line in answer["results"]:
        sys.stdout.write(f"{line}\n")
    return 0


def _apply(args: argparse.Namespace) -> int:
    objects = _load([*args.paths, *args.filename])
    if args.dry_run:
        for obj in objects:
            sys.stdout.write(f"{obj['kind'].lower()}/{obj['metadata']['name']} is valid\n")
        return 0
    return _print_results(_ask(args, {"op": "apply", "objects": objects}))


def _delete(args: argparse.Namespace) -> int:
    if args.filename:
        targets = [(o["kind"], o["metadata"]["name"]) for o in _load(args.filename)]
    else:
        word, name = _split(args.kind or "", args.name)
        if not word or name is None:
            raise CommandError("say what to delete: KIND NAME, or -f FILE")
        targets = [(kind_of(word)[0], name)]
    for kind, name in targets:
        _print_results(_ask(args, {"op": "delete", "kind": kind, "name": name}))
    return 0


def _scale(args: argparse.Namespace) -> int:
    word, name = _split(args.kind, args.name)
    if name is None:
        raise CommandError("say what to scale: workerpool NAME, model NAME or router NAME")
    if args.replicas < 0:
        raise CommandError(f"--replicas {args.replicas} must be at least 0")
    kind = kind_of(word)[0]
    request = {"op": "scale", "kind": kind, "name": name, "replicas": args.replicas}
    return _print_results(_ask(args, request))


def _events(args: argparse.Namespace) -> int:
    args.kind, args.name, args.output = "events", None, "json" if args.json else "table"
    return _get(args)
