"""`tandem up`: run the YAML on this machine, show it becoming Ready, end everything at the end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import shlex
import signal
import sys
import time
from pathlib import Path

from tandem_operator.cli import table
from tandem_operator.cli.errors import CommandError
from tandem_operator.local.cluster import ClusterError, LocalCluster
from tandem_operator.local.control_socket import ControlServer
from tandem_operator.local.port_forward import PortInUseError
from tandem_operator.local.state_dir import RunDir, RunDirError
from tandem_operator.manifests import Manifest, ManifestError, load_paths
from tandem_operator.node.images import ImageTable
from tandem_operator.resources.base import Object

SHOWN = ("Model", "Router")

# Rows come one by one, so columns have room for their longest usual words from the start.
_ROOM = {"REASON": 16, "SLO": 9, "BUDGET": 12}


def up(args: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        manifests = load_paths(args.paths)
        rundir = RunDir(
            args.cluster or Path(args.paths[0]).resolve().stem, exact=args.cluster is not None
        )
    except ManifestError as error:
        raise CommandError(f"the YAML cannot be used\n{error}") from error
    except RunDirError as error:
        raise CommandError(str(error)) from error
    try:
        return asyncio.run(_up(args, manifests, rundir))
    except (PortInUseError, ClusterError, RunDirError) as error:
        raise CommandError(str(error)) from error


async def _up(args: argparse.Namespace, manifests: list[Manifest], rundir: RunDir) -> int:
    began = time.monotonic()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(sig, stop.set)
    cluster = LocalCluster(
        rundir,
        port=args.port or 8000,
        exact_port=args.port is not None,
        images=_images(args.image),
        prometheus_url=args.prometheus,
    )
    cluster.on_problem = lambda text: print(text, file=sys.stderr)
    async with cluster:
        server = ControlServer(cluster, rundir.socket)
        await server.start()
        shower = asyncio.create_task(show_changes(cluster))
        try:
            await cluster.apply_manifests(manifests)
            waiter = asyncio.create_task(cluster.wait_ready(args.timeout if args.once else 1e9))
            stopper = asyncio.create_task(stop.wait())
            await asyncio.wait({waiter, stopper}, return_when=asyncio.FIRST_COMPLETED)
            if not waiter.done():
                waiter.cancel()
                _say("stopping")
                return 130 if args.once else 0
            try:
                waiter.result()
            except TimeoutError as error:
                raise ClusterError(str(error)) from error
            await asyncio.sleep(0.05)  # let the last row be shown before the summary
            _summary(cluster, time.monotonic() - began)
            if not args.once:
                await stop.wait()
                _say("stopping")
            stopper.cancel()
            return 0
        finally:
            shower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await shower
            await server.close()


def _images(overrides: list[str]) -> ImageTable:
    table = ImageTable()
    entrypoints, commands = dict(table.entrypoints), dict(table.commands)
    for override in overrides:
        name, _, command = override.partition("=")
        if not name or not command:
            raise ClusterError(f"--image {override!r} is not NAME=COMMAND")
        # What a pod runs by a name of its own, as `vllm serve`, is found by that name.
        entrypoints[name] = commands[name] = tuple(shlex.split(command))
    return ImageTable(entrypoints, commands)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _summary(cluster: LocalCluster, elapsed_s: float) -> None:
    routers = [r["metadata"]["name"] for r in cluster.store.find("Router")]
    _say(f"\nready after {elapsed_s:.1f} s (cluster {cluster.rundir.name})")
    for name in routers:
        url = cluster.url(name)
        body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
        _say(f"{name}: {url}/v1")
        _say(f"  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'")
    _say("stop with Ctrl-C; see `tandem get`, `tandem logs NAME`, `tandem apply FILE`")


async def show_changes(cluster: LocalCluster) -> None:
    """Print a row for each visible change of a Model or Router, as `kubectl get -w` does."""
    widths: dict[str, list[int]] = {}
    last: dict[tuple[str, str], list[str]] = {}
    changes: asyncio.Queue[tuple[str, Object]] = asyncio.Queue()

    async def follow(kind: str) -> None:
        async for event in cluster.store.watch(kind):
            await changes.put((event.type, event.object))

    followers = [asyncio.create_task(follow(kind)) for kind in SHOWN]
    try:
        while True:
            what, obj = await changes.get()
            kind, name = obj["kind"], obj["metadata"]["name"]
            if not obj.get("status"):
                continue
            cells = table.row(kind, obj)[:-1]
            if what == "DELETED":
                cells.append("deleted")
            elif last.get((kind, name)) == cells:
                continue
            last[(kind, name)] = cells
            if kind not in widths:
                widths[kind] = [0] * len(cells)
                head = table.header(kind)[:-1]
                widths[kind][0] = max(
                    len(f"{kind.lower()}/{o['metadata']['name']}") for o in cluster.store.find(kind)
                )
                for i, title in enumerate(head):
                    widths[kind][i] = max(widths[kind][i], _ROOM.get(title, 0))
                _say(table.render([head], widths[kind])[0])
            cells = [f"{kind.lower()}/{name}", *cells[1:]]
            _say(table.render([cells], widths[kind])[0])
            blocked = table.cell(obj, '.status.conditions[?(@.type=="Ready")].reason')
            if blocked not in ("Serving", "Starting", "", "Degraded"):
                message = (obj.get("status") or {}).get("message", "")
                _say(f"  {message}")
                _say(f"  tandem explain {blocked}: what that means and what to do")
    finally:
        for task in followers:
            task.cancel()
        await asyncio.gather(*followers, return_exceptions=True)
