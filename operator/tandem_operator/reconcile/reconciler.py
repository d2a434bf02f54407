"""Reconcile one resource: observe, plan, apply, status; for local mode and Kubernetes alike.

Level-triggered: everything is read again from the API each time, nothing is remembered between
passes, and a pass that finds the wanted state writes nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from tandem_operator.plan import Plan, Settings, plan_model, plan_router, revision_of
from tandem_operator.plan.conditions import condition
from tandem_operator.plan.decode import leftovers, models_of, parse
from tandem_operator.plan.made_of import MADE_OF_ANNOTATION, why_new_pods
from tandem_operator.plan.measured_prices import measured_prices
from tandem_operator.plan.model_status import (
    SILENT,
    LinkTest,
    WorkerReports,
    asleep,
    by_hand,
    model_status,
    pool_status,
)
from tandem_operator.plan.objects import (
    COST_ANNOTATION,
    MANAGED,
    MODEL_LABEL,
    PEER_SECRET,
    REVISION_LABEL,
    ROLE_LABEL,
    ROUTER_LABEL,
    Object,
    Problem,
)
from tandem_operator.plan.permissions import refusals, secrets_of
from tandem_operator.plan.pods import Blocker, is_ready
from tandem_operator.plan.replica_failure import refused_pods
from tandem_operator.plan.router_facts import TrafficFacts
from tandem_operator.plan.router_status import router_status, service_endpoint
from tandem_operator.plan.training import failed_training
from tandem_operator.reconcile.actuator import PERIOD_S, WAKE_PERIOD_S
from tandem_operator.reconcile.children import SECRET_RETRY_S, apply_plan, claims_of, own_children
from tandem_operator.reconcile.cluster_api import ApiError, ClusterApi
from tandem_operator.reconcile.event_recorder import EventRecorder
from tandem_operator.reconcile.events import News, news_in
from tandem_operator.reconcile.missing_sources import missing_source
from tandem_operator.reconcile.namespace_claim import TAKEN_RETRY_S, NamespaceClaims
from tandem_operator.reconcile.owners import is_controlled
from tandem_operator.reconcile.predictor_source import (
    PredictorSource,
    predictor_source,
    show_at_once,
)
from tandem_operator.reconcile.requeue import SETTLE_S, Key, Result
from tandem_operator.reconcile.rotation import Looked
from tandem_operator.resources import Model, Router, WorkerPool

LINK_RETRY_S = 5.0
PUSH_RETRY_S = 2.0

LinkTester = Callable[[list[Object]], Awaitable[LinkTest]]
Traffic = Callable[[list[Object]], Awaitable[TrafficFacts | None]]
Push = Callable[[list[Object], str, Object], Awaitable[tuple[list[str], bool]]]
Busy = Callable[[list[Object]], Awaitable[dict[str, int]]]
Reports = Callable[[list[Object]], Awaitable[WorkerReports]]
Scaling = Callable[[Router, Mapping[str, Model], list[Object]], Awaitable[list[dict[str, str]]]]
Endpoint = Callable[[Router], str]
Forget = Callable[[str, str], None]
Rotate = Callable[[str], Awaitable[Looked]]


async def _unmeasured(_: list[Object]) -> TrafficFacts | None:
    return None


async def _unpushed(pods: list[Object], revision: str, live: Object) -> tuple[list[str], bool]:
    return [], True


async def _unscaled(
    router: Router, models: Mapping[str, Model], pods: list[Object]
) -> list[dict[str, str]]:
    return []


async def _unknown_load(_: list[Object]) -> dict[str, int]:
    return {}


async def _unreported(_: list[Object]) -> WorkerReports:
    return SILENT


def _nothing_remembered(namespace: str, name: str) -> None:
    return None


async def _never_rotated(namespace: str) -> Looked:
    return Looked()


async def _untested(_: list[Object]) -> LinkTest:
    return LinkTest(None)


@dataclass
class Reconciler:
    """Brings one resource at a time to its wanted state.

    now: the time as RFC 3339. link_tester: pushes a block between two workers of a Model's pods.
    traffic: what a Router's pods measured. push: puts changed settings in force in a Router's
    pods and says what changed. busy: requests that each worker pod holds, by name.
    reports: what worker pods say of their weights, and of what people should know.
    endpoint: the URL under which a Router answers. scaling: steps the control loop of a managed
    Router, writing replicas and thresholds; gives its last decisions. forget: told the namespace
    and name of a Router that is gone. stale: told those of one whose pods were given something
    new, so that `traffic` measures again after SETTLE_S. rotate: takes a step of a change of a
    namespace's token. claims: which release looks after a namespace; None where there can be no
    other.
    """

    api: ClusterApi
    settings: Settings
    now: Callable[[], str]
    link_tester: LinkTester = _untested
    traffic: Traffic = _unmeasured
    push: Push = _unpushed
    busy: Busy = _unknown_load
    reports: Reports = _unreported
    endpoint: Endpoint | None = None
    scaling: Scaling = _unscaled
    forget: Forget = _nothing_remembered
    stale: Forget = _nothing_remembered
    rotate: Rotate = _never_rotated
    claims: NamespaceClaims | None = None

    def __post_init__(self) -> None:
        self._events = EventRecorder(self.api)

    async def reconcile(self, key: Key) -> Result:
        """One pass over one resource. Raises ApiError when the cluster fails a call."""
        obj = await self.api.get(key.kind, key.namespace, key.name)
        result = Result()
        if obj is None:
            if key.kind == "Router":
                self.forget(key.namespace, key.name)
            await self._clean_up(key.namespace)
            return result
        if obj["metadata"].get("deletionTimestamp"):
            return result
        if self.claims is not None and (other := await self.claims.taken(key.namespace)):
            if (text := self.claims.news(obj["metadata"]["uid"], other)) is not None:
                await self._tell(obj, News("Warning", "OtherRelease", text), result)
            result.look_again(TAKEN_RETRY_S)
            return result
        token = await self.rotate(key.namespace)
        if token.again_s is not None:
            result.look_again(token.again_s)
        resource = parse(obj)
        if isinstance(resource, Problem):
            await self._refuse(obj, resource, result)
        elif isinstance(resource, Model):
            await self._model(resource, obj, token, result)
        elif isinstance(resource, Router):
            await self._router(resource, obj, token, result)
        elif isinstance(resource, WorkerPool):
            if not is_controlled(obj):
                await self._write_status(obj, by_hand(obj, self.now()), result)
        else:
            await self._accept(obj, result)
        return result

    async def _model(self, model: Model, obj: Object, held: Looked, result: Result) -> None:
        namespace = model.metadata.namespace
        labels = {**MANAGED, MODEL_LABEL: model.metadata.name}
        children = await own_children(self.api, obj, labels)
        pods = await self.api.select("Pod", namespace, {MODEL_LABEL: model.metadata.name})
        old = obj.get("status") or {}
        token = secrets.token_urlsafe(32)
        plan = Plan(problems=await self._refusals(model, result))
        if not plan.problems:
            plan = plan_model(model, children, pods, self.settings, token, old.get("weights"))
        plan.notes += _notes(model, held, pods)
        await self._price_deletions(plan, pods, result)
        await apply_plan(self.api, model, plan, children, pods, result)
        # As they were seen: one made in this pass has nothing to say yet, and wakes the next one.
        pools = {o["metadata"]["name"]: o for o in children if o["kind"] == "WorkerPool"}
        for name, pool in pools.items():
            role = pool["spec"]["role"]
            own = [p for p in pods if p["metadata"]["labels"].get(ROLE_LABEL) == role]
            selector = f"{MODEL_LABEL}={model.metadata.name},{ROLE_LABEL}={role}"
            status = pool_status(pool, own, selector, self.now())
            await self._write_status(pools[name], status, result)
        link = await self.link_tester(pods)
        if link.ok is not True and _both_roles_ready(pods):
            result.look_again(LINK_RETRY_S)
        revision = revision_of(model, self.settings) if plan.apply else ""
        status = model_status(
            model,
            old,
            plan,
            revision,
            pools,
            pods,
            link,
            self.now(),
            refused=await self._without_pods(children, pods, result),
            reports=await self.reports([p for p in pods if is_ready(p)]),
            claims=claims_of(children),
        )
        await self._write_status(obj, status, result)

    async def _price_deletions(self, plan: Plan, pods: list[Object], result: Result) -> None:
        """Before a pool shrinks, say on its pods how busy they are: the idlest goes first."""
        for deployment in plan.apply:
            if deployment["kind"] != "Deployment":
                continue
            role = deployment["metadata"]["labels"][ROLE_LABEL]
            own = [p for p in pods if p["metadata"]["labels"].get(ROLE_LABEL) == role]
            staying = [p for p in own if is_ready(p)]
            if not 0 < deployment["spec"]["replicas"] < len(staying):
                continue
            for name, busy in (await self.busy(staying)).items():
                pod = next(p for p in staying if p["metadata"]["name"] == name)
                known = (pod["metadata"].get("annotations") or {}).get(COST_ANNOTATION)
                if known != str(busy):
                    namespace = pod["metadata"]["namespace"]
                    await self.api.annotate("Pod", namespace, name, {COST_ANNOTATION: str(busy)})
                    result.writes += 1

    async def _router(self, router: Router, obj: Object, held: Looked, result: Result) -> None:
        namespace = router.metadata.namespace
        labels = {**MANAGED, ROUTER_LABEL: router.metadata.name}
        models: dict[str, Model] = {}
        objects: dict[str, Object] = {}
        model_errors: dict[str, str] = {}
        for name in models_of(obj):
            other = await self.api.get("Model", namespace, name)
            parsed = parse(other) if other is not None else None
            if other is not None and isinstance(parsed, Model):
                models[name], objects[name] = parsed, other
            elif isinstance(parsed, Problem):
                model_errors[name] = parsed.message
        routers: list[Router] = []
        if router.spec.scaling.mode == "Managed":
            # Only those that could manage the same Model are worth the parsing.
            used = set(models_of(obj))
            found = await self.api.select("Router", namespace)
            near = [o for o in found if used.intersection(models_of(o))]
            routers = [r for r in map(parse, near) if isinstance(r, Router)]
        children = await own_children(self.api, obj, labels, self.settings.entrance.kinds)
        pods = await self.api.select("Pod", namespace, {ROUTER_LABEL: router.metadata.name})
        policy = router.spec.scaling.policy_ref
        found_policy = policy and await self.api.get("AutoscalingPolicy", namespace, policy.name)
        read = parse(found_policy) if found_policy else None
        policy_error = read.message if isinstance(read, Problem) else ""
        policy_found = policy is None or found_policy is not None
        token = secrets.token_urlsafe(32)
        old = obj.get("status") or {}
        traffic = await self.traffic(pods)
        measured = measured_prices(router, models, old, traffic)
        retraining = traffic.retraining if traffic is not None else None
        plan = Plan(problems=await self._refusals(router, result))
        source = PredictorSource()
        if not plan.problems:
            source = await predictor_source(self.api, router, children, self.now())
            plan = plan_router(
                router,
                models,
                routers,
                self.settings,
                token,
                policy_found,
                policy_error,
                measured,
                retraining.run if retraining is not None else "",
                source.copy,
                model_errors,
            )
        plan.notes += _notes(router, held, pods)
        if source.problem is not None:
            plan.problems.append(source.problem)
            result.look_again(SECRET_RETRY_S)
        if retraining is None:
            # No pod says whether it is wanted any more.
            plan.keep |= {("Job", o["metadata"]["name"]) for o in children if o["kind"] == "Job"}
        for pod in pods:
            if revision := pod["metadata"]["labels"].get(REVISION_LABEL):
                plan.keep.add(("ConfigMap", f"{router.metadata.name}-router-{revision}"))
        await apply_plan(self.api, router, plan, children, pods, result)
        if source.copy is not None and source.copy in plan.apply:
            result.writes += await show_at_once(self.api, source.copy, pods)
            if source.is_new and pods:
                self._settle(router.metadata.namespace, router.metadata.name, result)
        await self._tell_of_new_pods(obj, plan, children, result)
        endpoint = (
            self.endpoint(router)
            if self.endpoint is not None
            else service_endpoint(router, self.settings.cluster_domain)
        )
        if plan.live is not None:
            await self._push(obj, plan, pods, result)
        if any(is_ready(p) for p in pods):
            result.look_again(self.settings.status_period_s)
        decisions = await self.scaling(router, models, pods)
        if router.spec.scaling.has_loop:
            result.look_again(WAKE_PERIOD_S if asleep(objects.values()) else PERIOD_S)
        status = router_status(
            router,
            old,
            plan,
            models,
            objects,
            pods,
            endpoint,
            traffic,
            self.now(),
            refused_pods=await self._without_pods(children, pods, result),
            claims=claims_of(children),
            prices=measured,
            failed_training=failed_training(children),
            children=children,
        )
        if decisions:
            status["decisions"] = decisions
        await self._write_status(obj, status, result)

    async def _without_pods(
        self, children: list[Object], pods: list[Object], result: Result
    ) -> Blocker | None:
        """What the status of no pod tells: none may be made, or one waits for what is not there."""
        if (refused := refused_pods(children)) is not None:
            return refused
        allow = self.settings.allow
        ask = allow is None or not allow.unlabelled_secrets
        missing = await missing_source(self.api, pods, children, ask_secrets=ask)
        if missing is not None:
            result.look_again(SECRET_RETRY_S)
        return missing

    def _settle(self, namespace: str, name: str, result: Result) -> None:
        """What pods say is asked anew once they had the time to take up what changed."""
        self.stale(namespace, name)
        result.look_again(SETTLE_S)

    async def _push(self, obj: Object, plan: Plan, pods: list[Object], result: Result) -> None:
        """Changed settings to the pods that run; each change is an Event on the Router."""
        changed, done = await self.push(pods, plan.revision, plan.live or {})
        if not done:
            result.look_again(PUSH_RETRY_S)
        if changed:
            metadata = obj["metadata"]
            self._settle(metadata["namespace"], metadata["name"], result)
            await self._tell(obj, News("Normal", "SettingsChanged", "; ".join(changed)), result)

    async def _tell_of_new_pods(
        self, obj: Object, plan: Plan, children: list[Object], result: Result
    ) -> None:
        """Why the router pods that run are replaced: not every change can be taken up by them."""
        old = next((c for c in children if c["kind"] == "Deployment"), None)
        new = next((o for o in plan.apply if o["kind"] == "Deployment"), None)
        if old is None or new is None:
            return
        before, after = old["metadata"], new["metadata"]
        if (before.get("labels") or {}).get(REVISION_LABEL) != after["labels"][REVISION_LABEL]:
            known = (before.get("annotations") or {}).get(MADE_OF_ANNOTATION)
            why = why_new_pods(known, after["annotations"][MADE_OF_ANNOTATION])
            text = f"router pods are replaced one after the other: {why}"
            await self._tell(obj, News("Normal", "NewPods", text), result)

    async def _tell(self, obj: Object, news: News, result: Result) -> None:
        await self._events.tell(obj, news, self.now())
        result.writes += 1

    async def tell_of_failure(self, key: Key, error: Exception, again_s: float) -> None:
        """That passes over a resource fail, on the resource itself.

        Raises ApiError when the cluster fails this call, too.
        """
        obj = await self.api.get(key.kind, key.namespace, key.name)
        if obj is None:
            return
        said = (
            str(error) if isinstance(error, ApiError) else "a defect of the operator; see its log"
        )
        text = f"cannot be looked after: {said}; tried again in {again_s:.1f} s"
        await self._events.tell(obj, News("Warning", "PassFailed", text), self.now())

    async def _refusals(self, resource: Model | Router, result: Result) -> list[Problem]:
        """What the installation does not allow; a Secret's label is looked at again later."""
        allow, names = self.settings.allow, sorted(set(secrets_of(resource).values()))
        if allow is None:
            return []
        if allow.unlabelled_secrets:
            names = []
        namespace = resource.metadata.namespace
        labels = {name: await self.api.secret_labels(namespace, name) for name in names}
        found = refusals(resource, self.settings, labels)
        if names:
            result.look_again(SECRET_RETRY_S)
        return found

    async def _clean_up(self, namespace: str) -> None:
        """With the last resource of a namespace goes the Secret that they shared."""
        for kind in ("Model", "Router"):
            if await self.api.select(kind, namespace):
                return
        labels = await self.api.secret_labels(namespace, PEER_SECRET)
        if labels is not None and MANAGED.items() <= labels.items():
            await self.api.delete("Secret", namespace, PEER_SECRET)
        if self.claims is not None:
            await self.claims.release(namespace)

    async def _refuse(self, obj: Object, problem: Problem, result: Result) -> None:
        """Say on the object itself why it is not run; what runs already keeps running."""
        generation = int(obj["metadata"].get("generation", 1))
        old = (obj.get("status") or {}).get("conditions") or []
        conditions = [
            condition(
                old,
                kind,
                "False",
                problem.reason,
                problem.message,
                generation=generation,
                now=self.now(),
            )
            for kind in ("Accepted", "Ready")
        ]
        status = {
            **(obj.get("status") or {}),
            "observedGeneration": generation,
            "conditions": conditions,
        }
        await self._write_status(obj, status, result)

    async def _accept(self, obj: Object, result: Result) -> None:
        generation = int(obj["metadata"].get("generation", 1))
        old = (obj.get("status") or {}).get("conditions") or []
        status = {
            "observedGeneration": generation,
            "conditions": [
                condition(
                    old,
                    "Accepted",
                    "True",
                    "Valid",
                    "the specification can be used",
                    generation=generation,
                    now=self.now(),
                )
            ],
        }
        await self._write_status(obj, status, result)

    async def _write_status(self, obj: Object, status: Object, result: Result) -> None:
        if obj.get("status") == status:
            return
        result.writes += 1
        found = news_in(obj, status)
        # Whoever ends between the two tells these again, as the same Events.
        for news in (n for n in found if n.once):
            await self._tell(obj, news, result)
        try:
            await self.api.apply_status({**obj, "status": status})
        except ApiError as error:
            if error.status == 404:  # deleted meanwhile
                return
            raise
        for news in (n for n in found if not n.once):
            await self._tell(obj, news, result)


def _notes(resource: Model | Router, token: Looked, pods: list[Object]) -> list[str]:
    """What people should know of a resource although it runs."""
    found = leftovers(resource)
    if token.is_missing and any(map(is_ready, pods)):
        found.append(
            f"Secret {PEER_SECRET} is gone: pods that run keep its token, and the operator cannot "
            "ask them; write the Secret back, or delete a pod: with its successor a new token is "
            "made, which the others read within a minute or two and refuse until then"
        )
    return found


def _both_roles_ready(pods: list[Object]) -> bool:
    roles = {p["metadata"]["labels"].get(ROLE_LABEL) for p in pods if is_ready(p)}
    return {"prefill", "decode"} <= roles
