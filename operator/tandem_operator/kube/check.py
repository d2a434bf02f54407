"""`python -m tandem_operator.kube.check`: whether an installation works, for `helm test`.

Looks at what the operator itself needs: an apiserver that answers, the definitions, the right to
list its resources, and a replica that leads.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

from tandem_operator.kube.client import KubeApi, connect
from tandem_operator.reconcile.cluster_api import KIND_INFO, ApiError

KINDS = ("Model", "Router", "AutoscalingPolicy", "WorkerPool")


async def findings(
    api: KubeApi, namespaces: Sequence[str | None], lease_namespace: str, lease: str, now: datetime
) -> list[str]:
    """What is wrong, each with the next step; nothing where all is well."""
    served = await api.served()
    if missing := [k for k in KINDS if KIND_INFO[k].plural not in served]:
        return [f"definitions of {', '.join(missing)} are missing; set crds.install=true"]
    wrong: list[str] = []
    for namespace in namespaces or (None,):
        for kind in KINDS:
            try:
                await api.list_page(kind, namespace, "")
            except ApiError as error:
                where = namespace or "all namespaces"
                wrong.append(f"{kind}s of {where} cannot be listed: {error}")
    held = await api.get("Lease", lease_namespace, lease)
    spec = (held or {}).get("spec") or {}
    if not spec.get("holderIdentity"):
        wrong.append("no operator leads; kubectl get pods says whether any runs")
    else:
        silent_s = (now - datetime.fromisoformat(spec["renewTime"])).total_seconds()
        if silent_s > 3 * float(spec.get("leaseDurationSeconds", 15)):
            who = spec["holderIdentity"]
            wrong.append(f"{who} leads and has said nothing for {silent_s:.0f} s; read its log")
    return wrong


async def _run(args: argparse.Namespace) -> list[str]:
    api = KubeApi(await connect(args.kubeconfig))
    try:
        now = datetime.now(UTC)
        return await findings(api, args.namespace, args.lease_namespace, args.lease_name, now)
    finally:
        await api.close()


def main(argv: Sequence[str] | None = None) -> int:
    """0 where all is well, else 1 and a line for everything that is not."""
    parser = argparse.ArgumentParser(prog="tandem-check", description="Check an installation.")
    parser.add_argument("--kubeconfig", help="outside a cluster: path of the kubeconfig")
    parser.add_argument("--namespace", action="append", default=[], help="that is looked after")
    parser.add_argument("--lease-namespace", required=True, help="namespace of the Lease")
    parser.add_argument("--lease-name", required=True, help="name of the Lease")
    args = parser.parse_args(argv)
    try:
        wrong = asyncio.run(_run(args))
    except ApiError as error:
        wrong = [str(error)]
    for line in wrong or ["the definitions are there, the operator may list them, and one leads"]:
        print(line, file=sys.stderr if wrong else sys.stdout)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
