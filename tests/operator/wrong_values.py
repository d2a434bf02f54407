"""Values of the right form that nothing could run with: name, YAML, path, sentence.

The forms are in `objects_table.py`. Both tables are held against local mode and a real apiserver.
"""

from __future__ import annotations

from objects_table import POLICY, model, router

WRONG: dict[str, tuple[str, str, str]] = {}

_ADDRESS = "a port from 1 to 65535; write https://host:port/v1"
_SOURCE = "source names a repository, bucket, claim or folder"
_ARTIFACT = "artifact names a ConfigMap, claim or folder"
_DEVICE = "cuda computes on GPUs that the role asks for, cpu would hold them idle"
_BYTES = "a number without a unit counts bytes"
_NO_CORE = "cpu of 0 asks for no core; write 500m, 4 or the like"
_MEMORY = f"memory below 64Mi starts no process; {_BYTES}"
_LABEL = "a label has a key such as gpu or example.com/gpu"


def _wrong(name: str, text: str, path: str, sentence: str) -> None:
    WRONG[name] = (text, path, sentence)


def _external(url: str, more: str = "") -> str:
    old, new = "modelRef: {name: l}", f'external: {{url: "{url}", model: b{more}}}'
    return router("").replace(old, new)


def _role(fields: str) -> str:
    return model(f"  unified: {fields}\n")


def _source(uri: str) -> str:
    return model("  unified: {}\n").replace("file:///models/m", uri)


def _weights(more: str, uri: str = "hf://org/name") -> str:
    return _source(f'{uri}", {more}, x: "').replace(', x: ""', "")


for what, url in {
    "99999": "https://api.example.com:99999/v1",
    "0": "https://api.example.com:0/v1",
    "in letters": "https://api.example.com:http/v1",
}.items():
    _wrong(f"port {what}", _external(url), "spec.tiers[1].external.url", _ADDRESS)
_wrong("url without a host", _external("https:///v1"), "spec.tiers[1].external.url", _ADDRESS)
_wrong(
    "IPv6 address left open",
    _external("https://[2001:db8::1/v1"),
    "spec.tiers[1].external.url",
    _ADDRESS,
)
_wrong(
    "url of an endpoint",
    _external("https://api.example.com/v1/chat/completions"),
    "spec.tiers[1].external.url",
    "url is the base to which the router adds /chat/completions and the like",
)
_wrong(
    "port of a judge",
    router(
        '  learning: {shadowShare: "0.1", judge: {url: "https://j.example:70000/v1", model: j}}\n'
    ),
    "spec.learning.judge.url",
    _ADDRESS,
)
_wrong(
    "port of an origin",
    router('  access: {corsOrigins: ["https://app.example:99999"]}\n'),
    "spec.access.corsOrigins[0]",
    "an origin is a scheme, a host and at most a port",
)
_wrong(
    "a service that does nothing",
    _external("https://a.example/v1", ", capabilities: {generation: false}"),
    "spec.tiers[1].external.capabilities",
    "a tier that neither answers nor embeds serves no request",
)
_wrong(
    "memory in bytes", _role('{resources: {memory: "1"}}'), "spec.unified.resources.memory", _MEMORY
)
_wrong(
    "memory in thousandths",
    _role("{resources: {memory: 16m}}"),
    "spec.unified.resources.memory",
    _MEMORY,
)
_wrong(
    "memory of a router",
    router('  resources: {memory: "16"}\n'),
    "spec.resources.memory",
    _MEMORY,
)
_wrong(
    "cores in bytes",
    _role("{resources: {cpu: 4Gi}}"),
    "spec.unified.resources.cpu",
    "cpu is a count of cores, at most 1024",
)
_wrong("no core at all", _role('{resources: {cpu: "0"}}'), "spec.unified.resources.cpu", _NO_CORE)
_wrong("no core for a router", router('  resources: {cpu: "0"}\n'), "spec.resources.cpu", _NO_CORE)
for field in ("checksum: true", "maxInflight: 1Gi", "localPrefillMaxTokens: 64"):
    _wrong(
        f"transfer of one role, {field}",
        model(f"  unified: {{}}\n  kvTransfer: {{{field}}}\n"),
        "spec.kvTransfer",
        "kvTransfer is between prefill and decode workers, and unified ones transfer nothing",
    )
_wrong(
    "KV cache in bytes",
    model('  engine: {kvCacheMemory: "1"}\n  unified: {}\n'),
    "spec.engine.kvCacheMemory",
    _BYTES,
)
_wrong(
    "claim of nothing",
    _weights('cache: {size: "0"}'),
    "spec.weights.cache.size",
    "size below 1Mi holds no weights",
)
_wrong(
    "store of nothing",
    router('  store: {sqlite: {size: "0"}}\n'),
    "spec.store.sqlite.size",
    "size below 1Mi holds no store",
)
_wrong(
    "storage class with spaces",
    router("  store: {sqlite: {storageClassName: No Such}}\n"),
    "spec.store.sqlite.storageClassName",
    "is not a name; use lower-case letters, digits, dashes and dots",
)
_wrong(
    "cache of nothing",
    router('  cache: {enabled: true, maxMemory: "0"}\n'),
    "spec.cache.maxMemory",
    "maxMemory below 1Ki holds no response",
)
_wrong(
    "cache for no time",
    router("  cache: {enabled: true, ttl: 0s}\n"),
    "spec.cache.ttl",
    "a ttl of 0 does nothing",
)
_wrong(
    "nothing under way",
    model('  prefill: {}\n  decode: {}\n  kvTransfer: {maxInflight: "0"}\n'),
    "spec.kvTransfer.maxInflight",
    "maxInflight must be from 64Ki to 16Gi",
)
_wrong(
    "answers at once",
    router("  slo: {ttft: {target: 0s}}\n"),
    "spec.slo.ttft.target",
    "a target of 0 does nothing",
)
_wrong(
    "labels kept for no time",
    router("  learning: {retention: 0s}\n"),
    "spec.learning.retention",
    "a retention of 0 does nothing",
)
_wrong(
    "verdict at once",
    router('  predictor: {artifact: "configmap://c"}\n  cascade: {deadline: 0ms}\n'),
    "spec.cascade.deadline",
    "a deadline of 0 does nothing",
)
_wrong(
    "trained all the time",
    router(
        '  predictor: {training: {data: "pvc://c/d", fromLabels: true, every: 0s}}\n'
        "  learning: {capture: Prompts}\n"
    ),
    "spec.predictor.training.every",
    "every of 0 does nothing",
)
_wrong(
    "no time to start",
    model("  unified: {}\n  rollout: {startupTimeout: 0s}\n"),
    "spec.rollout.startupTimeout",
    "a startupTimeout of 0 does nothing",
)
_wrong(
    "a year to leave",
    model("  unified: {}\n  drain: {timeout: 8760h}\n"),
    "spec.drain.timeout",
    "a worker may take at most 1h to leave",
)
for what, uri in {
    "repository of four parts": "hf://a/b/c/d",
    "claim in upper case": "pvc://My_Claim/folder",
    "claim without a name": "pvc:///folder",
    "bucket without a name": "s3:///prefix",
}.items():
    _wrong(what, _source(uri), "spec.weights.source", _SOURCE)
_wrong(
    "folder above all",
    _source("image:///../etc"),
    "spec.weights.source",
    "source may not lead out of what it names",
)
_wrong(
    "token for a folder",
    _weights("secretRef: {name: s}", "image:///m"),
    "spec.weights.secretRef",
    "secretRef is for downloads",
)
for what, uri in {
    "ConfigMap in upper case": "configmap://My_Map",
    "ConfigMap of three parts": "configmap://a/b/c",
}.items():
    text = router(f'  predictor: {{artifact: "{uri}"}}\n')
    _wrong(what, text, "spec.predictor.artifact", _ARTIFACT)
_wrong(
    "GPU of the cluster itself",
    _role("{gpus: 1, gpuResource: kubernetes.io/batteries}"),
    "spec.unified.gpuResource",
    "names below kubernetes.io are the cluster's own",
)
for what, selector in {
    "label with a space": "{'a b': c}",
    "label with a sentence": "{zone: 'not here!'}",
}.items():
    text = _role(f"{{nodeSelector: {selector}}}")
    _wrong(what, text, "spec.unified.nodeSelector", _LABEL)
_wrong(
    "taint of a value that only exists",
    _role("{tolerations: [{key: gpu, value: h100}]}"),
    "spec.unified.tolerations[0]",
    "value is compared with operator: Equal only",
)
_wrong(
    "taint without a key",
    _role("{tolerations: [{operator: Equal, value: h100}]}"),
    "spec.unified.tolerations[0]",
    "operator: Equal needs the key of the taint",
)
_wrong(
    "image with a space",
    model("  image: my worker\n  unified: {}\n"),
    "spec.image",
    "is not an image; write one such as",
)
_wrong(
    "CPU on a GPU",
    model("  engine: {device: cpu}\n  unified: {gpus: 1}\n"),
    "spec.engine.device",
    _DEVICE,
)
_wrong(
    "CUDA without a GPU",
    model("  engine: {device: cuda}\n  unified: {}\n"),
    "spec.engine.device",
    _DEVICE,
)
_wrong(
    "a step smaller than its batch",
    model("  engine: {maxBatchedTokens: 64, maxNumSeqs: 65}\n  unified: {}\n"),
    "spec.engine.maxBatchedTokens",
    "each running sequence takes a token of a step",
)
_wrong(
    "one Model as two tiers",
    router("").replace("{name: l}", "{name: s}"),
    "spec.tiers",
    "two tiers have the same Model and would be one",
)
_wrong(
    "shares for half of the requests",
    router("")
    .replace("{name: s}", '{name: s}, maxShare: "0.2"')
    .replace("{name: l}", '{name: l}, maxShare: "0.3"'),
    "spec.tiers",
    "the maxShare of all tiers add up to less than 1",
)
_wrong(
    "tenant of a tier that is not there",
    router("  tenants: [{name: t, allowedTiers: [huge]}]\n"),
    "spec.tenants",
    "allowedTiers of a tenant must be names of tiers",
)
_wrong(
    "tenant of no tier",
    router("  tenants: [{name: t, allowedTiers: []}]\n"),
    "spec.tenants[0].allowedTiers",
    "at least 1 items",
)
_SCHEDULES = POLICY + "  schedules:\n  - {cron: '0 8 * * *', minReplicas: 2, "
_wrong(
    "schedule for no time",
    _SCHEDULES + "name: day, duration: 0s}\n",
    "spec.schedules[0].duration",
    "a duration of 0 does nothing",
)
_wrong(
    "schedule without a name",
    _SCHEDULES + "name: '', duration: 1h}\n",
    "spec.schedules[0].name",
    "at least 1 char",
)
_wrong(
    "asleep at once",
    POLICY + "  idle: {scaleToZero: true, after: 0s}\n",
    "spec.idle.after",
    "after of 0 does nothing",
)
_wrong(
    "five times all KV blocks",
    POLICY.replace('"0.8"', '"5"'),
    "spec.decode.signals[0]",
    "KVUtilization is the share of KV blocks in use and never above 1",
)
