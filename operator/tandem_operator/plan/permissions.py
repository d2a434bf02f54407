"""Whether an installation allows what a Model or Router asks for: each refusal with its rule.

A podPatch is read, not the pod that it gives: what the operator plans itself needs no permission.
Fields are allowed by name, so that one which Kubernetes adds tomorrow is refused until it is known.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from tandem_operator.plan.objects import SCRATCH_DIR, Problem, Settings
from tandem_operator.resources import Model, Router
from tandem_operator.resources.allow_list import USABLE_BY_LABEL, AllowList
from tandem_operator.resources.base import Object
from tandem_operator.resources.field_errors import show_path
from tandem_operator.resources.pod_patch import misfits, wrong_quantities
from tandem_operator.resources.rules.engines import VLLM_LOADS_CODE
from tandem_router.config.addresses import Outward, networks

# What may be patched: scheduling, resources, storage, environment, and what only tightens.
_POD_FIELDS = frozenset(
    {
        "activeDeadlineSeconds",
        "affinity",
        "containers",
        "imagePullSecrets",
        "initContainers",
        "nodeSelector",
        "preemptionPolicy",
        "priorityClassName",
        "resourceClaims",
        "runtimeClassName",
        "schedulerName",
        "terminationGracePeriodSeconds",
        "tolerations",
        "topologySpreadConstraints",
        "volumes",
    }
)
_CONTAINER_FIELDS = frozenset(
    {
        "env",
        "envFrom",
        "imagePullPolicy",
        "name",
        "ports",
        "resources",
        "stdin",
        "tty",
        "volumeMounts",
    }
)
_OWN_CONTAINERS = frozenset({"worker", "router", "fetch-weights", "train-predictor"})
# Volumes of the operator's own: what another source would put there is configuration, a token,
# weights or compiled code. An empty one is its owner's to have.
_OWN_VOLUMES = frozenset(
    {
        *("config", "copied-predictor", "data", "embedding", "endpoints", "gateway-tls"),
        *("metrics-token", "peer", "pin", "predictor", "scratch", "store", "store-url", "training"),
        *("tenant-key", "weights"),
    }
)
_OWN_VOLUME_PREFIXES = ("keys-",)
_VOLUMES = frozenset(
    {"configMap", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "secret"}
)
# Variables by which a loader, an interpreter or a compiler runs other code than the image's.
_CODE_PREFIXES = (
    *("LD_", "PYTHON", "TRITON_", "NVCC", "OPENSSL_", "TORCHINDUCTOR_", "OMPI_MCA_", "PMIX_MCA_"),
    *("CUDA_HOME", "CUDA_INJECTION", "CUDA_PATH", "VLLM_PLUGINS", "VLLM_LOGGING_CONFIG"),
    # By these a container takes GPUs of the node that nobody gave it.
    *("NVIDIA_", "AMD_VISIBLE", "HABANA_VISIBLE"),
)
_CODE_VARIABLES = frozenset(
    {
        *("BASH_ENV", "CC", "CXX", "ENV", "GCONV_PATH", "GLIBC_TUNABLES", "HOME", "LOCPATH"),
        # Where code that was compiled before is looked for, and whom a pod's token is shown to.
        *("TEMP", "TMP", "TMPDIR", "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"),
        *("NODE_OPTIONS", "PATH", "VIRTUAL_ENV", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"),
        *("HF_MODULES_CACHE", "TORCH_EXTENSIONS_DIR", "TORCH_HOME", "UCX_MODULE_DIR"),
        *("NCCL_CONF_FILE", "NCCL_ENV_PLUGIN", "NCCL_GIN_PLUGIN", "NCCL_NET_PLUGIN"),
        *("NCCL_PROFILER_PLUGIN", "NCCL_TUNER_PLUGIN"),
        *("VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_CACHE_ROOT", "VLLM_SERVER_DEV_MODE"),
        *("VLLM_TORCH_PROFILER_DIR", "VLLM_USE_MODELSCOPE"),
    }
)
# Flags of vLLM and SGLang by whose value a server reads more flags or loads what it names.
_NAMES_CODE = {
    "additional-config": "",
    "compilation-config": "backend",
    "config": "",
    "distributed-executor-backend": ".",
    "ec-transfer-config": "",
    "io-processor-plugin": "",
    "kv-transfer-config": "module_path",
    "load-format": "p",  # pt and npcache unpickle
    "profiler-config": "",
    "structured-outputs-config": "plugin",
}
# Where volumes may appear: nowhere that code is loaded from.
_MOUNTS = ("/data", "/dev/shm", "/mnt", "/tmp", "/var/cache", "/var/lib/tandem")
# Here a compiler keeps code, so that only what begins empty may be mounted.
_EMPTY_MOUNTS = ("/tmp",)
_MAY_NOT = " may not be patched; remove it"
_PROBES = frozenset({"livenessProbe", "readinessProbe", "startupProbe"})

_NAMES_A_SECRET = frozenset({"secret", "secretRef", "secretKeyRef", "nodePublishSecretRef"})

SecretLabels = Mapping[str, Mapping[str, str] | None]


def patches(resource: Model | Router) -> dict[str, Mapping[str, Any]]:
    """The podPatches of a resource, by their path."""
    if isinstance(resource, Router):
        found = {"spec.podPatch": resource.spec.pod_patch}
    else:
        found = {f"spec.{r}.podPatch": s.pod_patch for r, s in resource.spec.roles().items()}
    return {path: patch for path, patch in found.items() if patch}


def secrets_of(resource: Model | Router) -> dict[str, str]:
    """The Secrets that a resource names, by path; every field called ...SecretRef is one."""
    spec = resource.spec.to_wire()
    return dict([*_typed_secrets(spec, "spec"), *_patched_secrets(spec, "spec", patched=False)])


def _typed_secrets(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key == "podPatch":
                continue
            if key.lower().endswith("secretref"):
                yield f"{path}.{key}", str(inner["name"])
            else:
                yield from _typed_secrets(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _typed_secrets(entry, f"{path}[{index}]")


def _patched_secrets(value: Any, path: str, patched: bool) -> Iterator[tuple[str, str]]:
    """Every place of a podPatch that names a Secret, at any depth."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            where = f"{path}.{key}"
            if patched and key in _NAMES_A_SECRET and isinstance(inner, Mapping):
                name = inner.get("secretName") or inner.get("name")
                if isinstance(name, str):
                    yield where, name
            elif patched and key == "imagePullSecrets":
                for index, name in enumerate(_names(inner, "name")):
                    yield f"{where}[{index}]", name
            yield from _patched_secrets(inner, where, patched or key == "podPatch")
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _patched_secrets(entry, f"{path}[{index}]", patched)


def refusals(resource: Model | Router, settings: Settings, secrets: SecretLabels) -> list[Problem]:
    """Why the installation does not allow this resource; empty when it does.

    secrets: labels of the Secrets that it names, None for one that does not exist.
    """
    allow = settings.allow
    if allow is None:
        return []
    found: list[Problem] = []
    namespace = resource.metadata.namespace
    if namespace == settings.own_namespace and not allow.own_namespace:
        found.append(
            _refusal(
                "NamespaceNotAllowed",
                f"{namespace} is the operator's own namespace, where pods of users could reach its "
                "account; use another namespace",
                "allow.ownNamespace=true",
            )
        )
    found += _image(resource, settings, allow)
    found += _remote_code(resource, allow)
    found += _host_paths(resource, allow)
    if isinstance(resource, Model):
        for role, spec in resource.spec.roles().items():
            where = f"spec.{role}.priorityClassName"
            found += _priority(spec.priority_class_name, where, allow)
    for path, patch in patches(resource).items():
        found += _misspelt(patch, path, _patch(patch, path, settings, allow))
        found += [
            Problem("Accepted", "Invalid", f"{show_path((path, *at))}: {said}")
            for at, said in wrong_quantities(patch)
        ]
    found += _secrets(resource, allow, secrets)
    if isinstance(resource, Router):
        found += _providers(resource, allow)
    return found


def _providers(router: Router, allow: AllowList) -> list[Problem]:
    """External tiers and judges inside the cluster, and keys that can be read on their way.

    A name is looked at here, and what it stands for by the router at every connection.
    """
    rule = Outward(only_public=True, allowed=networks(allow.external_networks))
    found: list[Problem] = []
    for where, url, has_key in router.spec.providers():
        if (why := rule.refused_url(url)) is not None:
            text = f"{where} {url!r} {why}; use a public one"
            found.append(_refusal("AddressNotAllowed", text, "allow.externalNetworks={CIDR}"))
        if has_key and url.startswith("http://") and not allow.plain_http_keys:
            text = f"{where} {url!r} is plain http, which shows the API key on the way; use https"
            found.append(_refusal("KeyInTheClear", text, "allow.plainHttpKeys=true"))
    return found


def _refusal(reason: str, message: str, value: str) -> Problem:
    return Problem("Accepted", reason, f"{message}, or set {value} in the chart")


def _image(resource: Model | Router, settings: Settings, allow: AllowList) -> list[Problem]:
    image = resource.spec.image
    return [] if image is None else _image_at("spec.image", image, settings, allow)


def _remote_code(resource: Model | Router, allow: AllowList) -> list[Problem]:
    if isinstance(resource, Router) or allow.remote_code:
        return []
    # As servers read a flag: with underscores, or abbreviated; "false" is its harmless form.
    code = [
        name
        for name, value in resource.spec.engine.args.items()
        if (_loads_code(name.replace("_", "-").split(".")[0]) and value != "false")
        or _names_code(name.replace("_", "-"), value)
    ]
    text = "engine.args {} runs Python that comes with the weights, or that it names; remove it"
    return [
        _refusal("CodeNotAllowed", text.format(repr(name)), "allow.remoteCode=true")
        for name in code
    ]


def _loads_code(flag: str) -> bool:
    """Whether a server may take a flag, abbreviated or not, for one that loads code."""
    names = ("trust-remote-code", *VLLM_LOADS_CODE)
    return len(flag) > 1 and any(name.startswith(flag) for name in names)


def _names_code(flag: str, value: str) -> bool:
    """Whether a flag's value, or its part behind a dot, may be a module or a file of flags."""
    first = flag.split(".")[0]
    said = f"{flag.removeprefix(first)} {value}"
    return len(first) > 3 and any(
        name.startswith(first) and mark in said for name, mark in _NAMES_CODE.items()
    )


def _image_at(path: str, image: Any, settings: Settings, allow: AllowList) -> list[Problem]:
    own = (settings.worker_image, settings.router_image)
    if image in own or any(_below(image, prefix) for prefix in allow.images):
        return []
    names = ", ".join([*own, *allow.images])
    text = f"{path} {image!r} is none of {names}; use one of them"
    return [_refusal("ImageNotAllowed", text, f"allow.images={{{image}}}")]


def _below(image: Any, prefix: str) -> bool:
    """Whether an image lies at or below a prefix; registry/ml does not cover registry/mlx."""
    if not isinstance(image, str) or not image.startswith(prefix):
        return False
    rest = image[len(prefix) :]
    return not rest or prefix[-1] in "/:@" or rest[0] in "/:@"


def _uris(resource: Model | Router) -> dict[str, str | None]:
    if isinstance(resource, Model):
        return {"spec.weights.source": resource.spec.weights.source}
    predictor = resource.spec.predictor
    data = predictor.training.data if predictor.training else None
    return {
        "spec.predictor.artifact": predictor.artifact,
        "spec.predictor.training.data": data,
        "spec.predictor.embedding": predictor.embedding,
    }


def _host_paths(resource: Model | Router, allow: AllowList) -> list[Problem]:
    if "hostPath" in allow.volumes:
        return []
    return [
        _refusal(
            "VolumeNotAllowed",
            f"{path} {uri} mounts a folder of the node; use image:///, pvc://, hf:// or another "
            "source",
            "allow.volumes={hostPath}",
        )
        for path, uri in _uris(resource).items()
        # A relative one names no place on a node, and the plan says so.
        if uri is not None and uri.startswith("file:///")
    ]


def _misspelt(patch: Mapping[str, Any], path: str, refused: list[Problem]) -> list[Problem]:
    """The same refusals; of a field that no pod has, with the one that it may mean.

    A cluster may know fields of tomorrow: how to allow it is said, too.
    """
    unknown = {show_path((path, *at)): said for at, said in misfits(patch)} if refused else {}
    found = []
    for problem in refused:
        where, refusal, rest = problem.message.partition(_MAY_NOT)
        meant = unknown.get(where, "")
        if refusal and "did you mean" in meant:
            problem = replace(problem, message=f"{where}: {meant} Else remove it{rest}")
        found.append(problem)
    return found


def _patch(
    patch: Mapping[str, Any], path: str, settings: Settings, allow: AllowList
) -> list[Problem]:
    found: list[Problem] = []
    for key, value in patch.items():
        where = f"{path}.{key}"
        if key == "metadata":
            found += _metadata(value, where, allow)
        elif key == "spec" and isinstance(value, Mapping):
            for field, inner in value.items():
                found += _pod_field(field, inner, f"{where}.{field}", settings, allow)
            found += _prepared_mounts(value, where, allow)
        else:
            found.append(_field(key, where))
    return found


def _field(name: str, where: str) -> Problem:
    text = f"{where}{_MAY_NOT}"
    return _refusal("FieldNotAllowed", text, f"allow.podFields={{{name}}}")


def _metadata(value: Any, where: str, allow: AllowList) -> list[Problem]:
    """Labels let a pod into other Services and policies, annotations into other networks."""
    keys = value if isinstance(value, Mapping) else ()
    return [_field(key, f"{where}.{key}") for key in keys if key not in allow.pod_fields]


def _pod_field(
    field: str, value: Any, where: str, settings: Settings, allow: AllowList
) -> list[Problem]:
    if field in allow.pod_fields:
        return []
    if field in ("serviceAccountName", "serviceAccount"):
        if value in allow.service_accounts:
            return []
        text = f"{where} {value!r} is not a ServiceAccount that pods may run as; remove it"
        return [_refusal("AccountNotAllowed", text, f"allow.serviceAccounts={{{value}}}")]
    if field not in _POD_FIELDS:
        return [_field(field, where)]
    if field == "priorityClassName":
        return _priority(value, where, allow)
    entries = value if isinstance(value, list) else []
    if field == "volumes":
        return [
            p for i, entry in enumerate(entries) for p in _volume(entry, f"{where}[{i}]", allow)
        ]
    if field in ("containers", "initContainers"):
        return [
            problem
            for index, entry in enumerate(entries)
            for problem in _container(entry, f"{where}[{index}]", settings, allow)
        ]
    return []


def _volume(entry: Any, where: str, allow: AllowList) -> list[Problem]:
    types = set(entry) - {"name"} if isinstance(entry, Mapping) else set()
    name = str(entry.get("name")) if isinstance(entry, Mapping) else ""
    own = name in _OWN_VOLUMES or name.startswith(_OWN_VOLUME_PREFIXES)
    if own and not types <= {"emptyDir"}:
        text = f"{where} {name!r} is a volume of the operator's own; call yours by another name"
        return [_refusal("FieldNotAllowed", text, "allow.podFields={volumes}")]
    return [
        _refusal(
            "VolumeNotAllowed",
            f"{where} is of type {kind}; use one of {', '.join(sorted(_VOLUMES))}",
            f"allow.volumes={{{kind}}}",
        )
        for kind in sorted(types)
        if kind not in _VOLUMES and kind not in allow.volumes
    ]


def _prepared_mounts(spec: Mapping[str, Any], where: str, allow: AllowList) -> list[Problem]:
    """Mounts of volumes that do not begin empty where compiled code is loaded from."""
    if "volumeMounts" in allow.pod_fields:
        return []
    empty = {
        entry.get("name")
        for entry in _mappings(spec.get("volumes"))
        if set(entry) <= {"name", "emptyDir"}
    } | {"scratch"}
    return [
        _field("volumeMounts", f"{where}.{kind}[{index}].volumeMounts {mount.get('mountPath')}")
        for kind in ("containers", "initContainers")
        for index, entry in enumerate(_mappings(spec.get(kind)))
        for mount in _mappings(entry.get("volumeMounts"))
        if any(
            _at_or_below(posixpath.normpath(str(mount.get("mountPath"))), root)
            for root in _EMPTY_MOUNTS
        )
        and mount.get("name") not in empty
    ]


def _mappings(entries: Any) -> list[Mapping[str, Any]]:
    found = entries if isinstance(entries, list) else []
    return [entry for entry in found if isinstance(entry, Mapping)]


def _container(entry: Any, where: str, settings: Settings, allow: AllowList) -> list[Problem]:
    if not isinstance(entry, Mapping):
        return [_field("sidecars", where)]
    found: list[Problem] = []
    if (name := entry.get("name")) not in _OWN_CONTAINERS and "sidecars" not in allow.pod_fields:
        text = (
            f"{where} is called {name!r}, which is none of {', '.join(sorted(_OWN_CONTAINERS))} "
            "and would be one more container; correct its name, or remove it"
        )
        found.append(_refusal("FieldNotAllowed", text, "allow.podFields={sidecars}"))
    for key, value in entry.items():
        if key in allow.pod_fields:
            continue
        if key == "image":
            found += _image_at(f"{where}.image", value, settings, allow)
        elif key in _PROBES and not _reaches_out(value):
            continue
        elif key not in _CONTAINER_FIELDS:
            found.append(_field(key, f"{where}.{key}"))
        elif key == "env":
            for name in _names(value, "name"):
                if (
                    name.startswith(_CODE_PREFIXES) or name in _CODE_VARIABLES
                ) and name not in allow.pod_fields:
                    found.append(_field(name, f"{where}.env {name}"))
        elif key == "ports":
            found += [
                _field(name, f"{where}.{key}[{index}].{name}")
                for index, port in enumerate(value if isinstance(value, list) else [])
                for name in ("hostIP", "hostPort")
                if isinstance(port, Mapping) and name in port and name not in allow.pod_fields
            ]
        elif key == "envFrom" and value:
            # Whoever fills the source names the variables: LD_PRELOAD may be among them.
            found.append(_field(key, f"{where}.{key}"))
        elif key == "volumeMounts":
            found += [
                _field(key, f"{where}.{key} {path}")
                for path in map(posixpath.normpath, _names(value, "mountPath"))
                if not any(_at_or_below(path, root) for root in _MOUNTS)
                # Kernels that were compiled before are loaded from there.
                or _at_or_below(path, SCRATCH_DIR)
                or _at_or_below(SCRATCH_DIR, path)
            ]
    return found


def _at_or_below(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}/")


def _priority(name: Any, where: str, allow: AllowList) -> list[Problem]:
    """The cluster's own classes evict everybody else's pods."""
    if not str(name).startswith("system-") or "priorityClassName" in allow.pod_fields:
        return []
    text = f"{where} {name!r} is for the cluster's own pods; use another class"
    return [_refusal("FieldNotAllowed", text, "allow.podFields={priorityClassName}")]


def _reaches_out(probe: Any) -> bool:
    """Whether a probe runs a command, or makes the kubelet ask somebody else than the pod."""
    if not isinstance(probe, Mapping):
        return False
    return "exec" in probe or any(
        isinstance(way, Mapping) and "host" in way for way in probe.values()
    )


def _names(entries: Any, key: str) -> list[str]:
    return [str(entry.get(key)) for entry in _mappings(entries)]


def _secrets(resource: Model | Router, allow: AllowList, secrets: SecretLabels) -> list[Problem]:
    if allow.unlabelled_secrets:
        return []
    users = "models" if isinstance(resource, Model) else "routers"
    found: list[Problem] = []
    for path, name in secrets_of(resource).items():
        labels = secrets.get(name)
        label = f"kubectl label secret {name} {USABLE_BY_LABEL}={users}"
        if labels is None:
            text = f"{path}: there is no Secret {name}; create it and allow its use: {label}"
            found.append(Problem("Accepted", "SecretMissing", text))
        elif labels.get(USABLE_BY_LABEL) not in (users, "all"):
            text = (
                f"{path}: Secret {name} is not for {users}; whoever owns it may allow it: {label}"
            )
            found.append(_refusal("SecretNotAllowed", text, "allow.unlabelledSecrets=true"))
    return found


def taken(resource: Model | Router, obj: Object) -> Problem:
    """What to say of an object that stands where a child belongs, and is somebody else's."""
    metadata = obj["metadata"]
    owners = metadata.get("ownerReferences") or []
    owner = next((o for o in owners if o.get("controller")), None)
    whose = f"{owner['kind']} {owner['name']}" if owner else "nobody that it names"
    text = (
        f"{obj['kind']} {metadata['name']} exists and belongs to {whose}; it is left as it is. "
        f"Rename this {type(resource).__name__}, or delete that object if it is not needed"
    )
    return Problem("Accepted", "NameTaken", text)
