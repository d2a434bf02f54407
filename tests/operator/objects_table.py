# ruff: noqa: E501  (messages stand as they are printed)
"""Custom resources, good and bad: name, YAML, and the exact problems of the bad ones."""

MODEL = """\
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {name: m}
spec:
  weights: {source: "file:///models/m"}
  unified: {replicas: 1}
"""

ROUTER = """\
apiVersion: tandem.dev/v1alpha1
kind: Router
metadata: {name: r}
spec:
  tiers:
  - {name: small, modelRef: {name: s}}
  - {name: large, modelRef: {name: l}}
"""

POLICY = """\
apiVersion: tandem.dev/v1alpha1
kind: AutoscalingPolicy
metadata: {name: p}
spec:
  decode:
    signals:
    - {name: KVUtilization, target: "0.8"}
"""


def model(spec: str) -> str:
    """A Model with a spec given as YAML lines, indented by two."""
    head = "apiVersion: tandem.dev/v1alpha1\nkind: Model\nmetadata: {name: m}\nspec:\n"
    return head + '  weights: {source: "file:///models/m"}\n' + spec


def router(spec: str) -> str:
    """A Router with two tiers and more spec given as YAML lines, indented by two."""
    return ROUTER + spec


GOOD: dict[str, str] = {
    "smallest model": MODEL,
    "smallest router": ROUTER,
    "smallest policy": POLICY,
    "policy without spec": "apiVersion: tandem.dev/v1alpha1\nkind: AutoscalingPolicy\n"
    "metadata: {name: p}\n",
    "prefill and decode": model("  prefill: {replicas: 2}\n  decode: {replicas: 3}\n"),
    "stopped": model("  prefill: {replicas: 0}\n  decode: {replicas: 0}\n"),
    "gpus": model("  unified: {gpus: 1}\n"),
    "range": model("  unified: {replicas: 2, minReplicas: 1, maxReplicas: 4}\n"),
    "pvc": MODEL.replace("file:///models/m", "pvc://claim/dir"),
    "hf with a cache": MODEL.replace(
        '{source: "file:///models/m"}', '{source: "hf://org/name@main", cache: {size: 80Gi}}'
    ),
    "s3": MODEL.replace("file:///models/m", "s3://bucket/prefix"),
    "engine": model(
        "  engine: {dtype: bfloat16, maxModelLen: 4096, kvCacheMemory: 1Gi, scheduler: mlfq}\n"
        "  unified: {}\n"
    ),
    "vllm with flags of its own": model(
        "  image: v\n  engine: {type: VLLM, args: {max-loras: '4', quantization: fp8}}\n"
        "  unified: {}\n"
    ),
    "drain and rollout": model(
        "  unified: {}\n  drain: {timeout: 1m30s}\n  rollout: {maxSurge: 0, maxUnavailable: 1}\n"
    ),
    "pod patch": model(
        "  unified:\n    podPatch: {spec: {hostNetwork: true, containers: [{name: worker, tty: true}]}}\n"
    ),
    "placement": model(
        "  unified:\n    nodeSelector: {gpu: h100}\n    tolerations: [{key: gpu}]\n"
        "    priorityClassName: high\n    resources: {cpu: 500m, memory: 2Gi}\n"
    ),
    "learned from an artifact": router(
        '  predictor: {type: Learned, artifact: "configmap://chat"}\n'
    ),
    "learned from data": router(
        '  predictor: {type: Learned, training: {data: "file:///data.jsonl.gz"}}\n'
    ),
    "external tier": ROUTER.replace(
        "modelRef: {name: l}", 'external: {url: "https://api.example.com/v1", model: big}'
    ),
    "slo and budget": router(
        "  slo: {ttft: {percentile: 99, target: 500ms}, tpot: {target: 50ms}}\n"
        '  budget: {gpus: 8, usdPerHour: "24", onExhausted: Queue}\n'
    ),
    "managed": router("  scaling: {mode: Managed, policyRef: {name: p}}\n"),
    "threshold and share": router('  threshold: "0.25"\n  fallbackTier: small\n').replace(
        "modelRef: {name: l}}", 'modelRef: {name: l}, maxShare: "0.5"}'
    ),
    "learned is implied": router('  predictor: {artifact: "configmap://chat"}\n'),
    "floor that nothing measures": router('  objective: {qualityFloor: "0.9"}\n'),
    "schedule": POLICY + "  schedules:\n  - {name: day, cron: '0 8 * * MON-FRI', "
    "timeZone: Europe/Berlin, duration: 10h, minReplicas: 2}\n",
    "name that begins with a digit": MODEL.replace("name: m", "name: 7b"),
    "two documents": MODEL + "---\n" + ROUTER,
    "a list": "apiVersion: v1\nkind: List\nitems:\n"
    "- apiVersion: tandem.dev/v1alpha1\n  kind: Model\n  metadata: {name: a}\n"
    '  spec: {weights: {source: "file:///a"}, unified: {}}\n',
    "configmap beside": MODEL
    + "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata: {a: b}\n",
}

# name -> (YAML, problems as "line: subject: field: message")
BAD: dict[str, tuple[str, list[str]]] = {}


def bad(name: str, text: str, *problems: str) -> None:
    """Add a bad object."""
    BAD[name] = (text, list(problems))


bad(
    "not yaml",
    "a: [1, 2\n",
    "2: not YAML: expected ',' or ']', but got '<stream end>'",
)
bad(
    "tab",
    "a:\n\tb: 1\n",
    "2: not YAML: found character '\\t' that cannot start any token; indent with spaces",
)
bad(
    "empty",
    "# nothing\n",
    "1: holds no object; add a Model or a Router",
)
bad(
    "only text",
    "hello\n",
    "1: an object must be a mapping with apiVersion, kind, metadata and spec",
)
bad(
    "a number",
    "42\n",
    "1: an object must be a mapping with apiVersion, kind, metadata and spec",
)
bad(
    "no kind",
    "apiVersion: tandem.dev/v1alpha1\nmetadata: {name: m}\n",
    "1: kind is missing; use one of Model, Router, AutoscalingPolicy, WorkerPool",
)
bad(
    "misspelt kind",
    MODEL.replace("kind: Model", "kind: Modle"),
    "2: kind: 'Modle' is not known; did you mean Model?",
)
bad(
    "unknown kind",
    MODEL.replace("kind: Model", "kind: Zebra"),
    "2: kind: 'Zebra' is not known; use one of Model, Router, AutoscalingPolicy, WorkerPool, ConfigMap, Secret",
)
bad(
    "wrong version",
    MODEL.replace("v1alpha1", "v1"),
    "1: apiVersion: 'tandem.dev/v1' is not served; use tandem.dev/v1alpha1, the only version",
)
bad(
    "foreign group",
    MODEL.replace("tandem.dev/v1alpha1", "apps/v1"),
    "1: apiVersion: 'apps/v1' has no kind Model; use tandem.dev/v1alpha1",
)
bad(
    "no apiVersion",
    MODEL.replace("apiVersion: tandem.dev/v1alpha1\n", ""),
    "1: apiVersion is missing; write apiVersion: tandem.dev/v1alpha1",
)
bad(
    "no metadata",
    MODEL.replace("metadata: {name: m}\n", ""),
    "1: metadata: is missing; write metadata: {name: my-name}",
)
bad(
    "no name",
    MODEL.replace("{name: m}", "{labels: {a: b}}"),
    "3: metadata: name is missing; name the Model",
)
bad(
    "upper case name",
    MODEL.replace("name: m", "name: My_Model"),
    "3: metadata.name: 'My_Model' is not a name; use at most 40 lower-case letters, digits and inner dashes",
)
bad(
    "long name",
    MODEL.replace("name: m", "name: " + 41 * "a"),
    "3: metadata.name: 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' is not a name; use at most 40 lower-case letters, digits and inner dashes",
)
bad(
    "label that is a number",
    MODEL.replace("{name: m}", "{name: m, labels: {a: 1}}"),
    '3: metadata.labels.a: 1 is not text; write it quoted: "1"',
)
bad(
    "no spec",
    "apiVersion: tandem.dev/v1alpha1\nkind: Model\nmetadata: {name: m}\n",
    "1: Model/m: spec is missing; say what it should be",
)
bad(
    "field beside spec",
    MODEL + "specs: {}\n",
    "7: Model/m: specs: unknown field; did you mean spec?",
)
bad(
    "given twice",
    MODEL + "  unified: {replicas: 2}\n",
    "7: spec.unified: given twice, first in line 6; remove one",
)
bad(
    "unknown field",
    model("  unified: {replica: 1}\n"),
    "6: Model/m: spec.unified.replica: unknown field; did you mean replicas?",
)
bad(
    "unknown field far from all",
    model("  unified: {}\n  zebra: 1\n"),
    "7: Model/m: spec.zebra: unknown field; use one of weights, servedName, engine, unified, prefill, decode, kvTransfer, rollout, drain, image",
)
bad(
    "two unknown fields",
    model("  unifed: {}\n  engin: {}\n"),
    "6: Model/m: spec.unifed: unknown field; did you mean unified?",
    "7: Model/m: spec.engin: unknown field; did you mean engine?",
)
bad(
    "no weights",
    MODEL.replace('  weights: {source: "file:///models/m"}\n', ""),
    "4: Model/m: spec.weights: is required; add it",
)
bad(
    "no source",
    MODEL.replace('{source: "file:///models/m"}', "{}"),
    "5: Model/m: spec.weights.source: is required; add it",
)
bad(
    "weights scheme",
    MODEL.replace("file:///models/m", "ftp://host/m"),
    "5: Model/m: spec.weights.source: 'ftp://host/m' is not a weights URI; use hf://, s3://, pvc://, image:/// or file://",
)
bad(
    "text for a number",
    model('  unified: {replicas: "2"}\n'),
    '6: Model/m: spec.unified.replicas: "2" is text; write the number without quotes',
)
bad(
    "fraction for a count",
    model("  unified: {replicas: 1.5}\n"),
    "6: Model/m: spec.unified.replicas: must be a whole number, not 1.5",
)
bad(
    "negative count",
    model("  unified: {replicas: -1}\n"),
    "6: Model/m: spec.unified.replicas: -1 must be at least 0",
)
bad(
    "huge count",
    model("  unified: {replicas: 5000}\n"),
    "6: Model/m: spec.unified.replicas: 5000 must be at most 1000",
)
bad(
    "true for a number",
    model("  unified: {replicas: true}\n"),
    "6: Model/m: spec.unified.replicas: must be a whole number, not true",
)
bad(
    "text for a flag",
    model("  engine: {prefixCache: maybe}\n  unified: {}\n"),
    "6: Model/m: spec.engine.prefixCache: must be true or false, not 'maybe'",
)
bad(
    "list for a mapping",
    model("  unified: [1]\n"),
    "6: Model/m: spec.unified: must be a mapping of fields, not a list",
)
bad(
    "empty value",
    model("  unified: {replicas: }\n"),
    "6: Model/m: spec.unified.replicas: must be a whole number, not empty",
)
bad(
    "unknown choice",
    model("  engine: {dtype: fp16}\n  unified: {}\n"),
    "6: Model/m: spec.engine.dtype: 'fp16' is not allowed; use one of auto, float32, bfloat16, float16",
)
bad(
    "KV blocks of another engine",
    model("  image: vllm\n  engine: {type: VLLM, kvCacheDtype: fp8}\n  unified: {}\n"),
    "7: Model/m: spec.engine.kvCacheDtype: is 'fp8', but engine.kvCacheDtype is for engine.type Tandem; name another engine's own flag in engine.args, such as {kv-cache-dtype: fp8} for VLLM",
)
bad(
    "price as a number",
    model("  unified: {usdPerHour: 1.2}\n"),
    '6: Model/m: spec.unified.usdPerHour: 1.2 is a number; this field takes text, write it quoted: "1.2"',
)
bad(
    "price with a sign",
    model('  unified: {usdPerHour: "$2"}\n'),
    "6: Model/m: spec.unified.usdPerHour: '$2' is not a decimal number; write something like \"1.25\"",
)
bad(
    "duration without a unit",
    model('  unified: {}\n  drain: {timeout: "30"}\n'),
    '7: Model/m: spec.drain.timeout: \'30\' is not a duration; write a number with a unit, such as "500ms", "30s" or "5m"',
)
bad(
    "duration as a number",
    model("  unified: {}\n  drain: {timeout: 30}\n"),
    '7: Model/m: spec.drain.timeout: 30 has no unit; write a duration such as "30s" or "30m"',
)
bad(
    "bad quantity",
    model("  engine: {kvCacheMemory: 1GB}\n  unified: {}\n"),
    '6: Model/m: spec.engine.kvCacheMemory: \'1GB\' is not a quantity; write a number such as "2", "500m" or "4Gi"',
)
bad(
    "no role",
    'apiVersion: tandem.dev/v1alpha1\nkind: Model\nmetadata: {name: m}\nspec:\n  weights: {source: "file:///m"}\n',
    "4: Model/m: spec: set either unified or prefill and decode; exactly one of the two forms is needed",
)
bad(
    "both forms",
    model("  unified: {}\n  prefill: {}\n  decode: {}\n"),
    "4: Model/m: spec: set either unified or prefill and decode; exactly one of the two forms is needed",
)
bad(
    "prefill alone",
    model("  prefill: {}\n"),
    "4: Model/m: spec: prefill and decode go together; add the missing one or use unified",
)
bad(
    "one role at zero",
    model("  prefill: {replicas: 0}\n  decode: {replicas: 1}\n"),
    "6: Model/m: spec.prefill.replicas: is 0, but prefill and decode must both have replicas or both have none; set both to 0 to stop the model",
)
bad(
    "one role may reach zero",
    model("  prefill: {minReplicas: 0}\n  decode: {minReplicas: 1}\n"),
    "6: Model/m: spec.prefill.minReplicas: is 0, but prefill and decode must both be able to reach zero or neither; set minReplicas: 0 on both or on none",
)
bad(
    "min above max",
    model("  unified: {replicas: 3, minReplicas: 4, maxReplicas: 2}\n"),
    "6: Model/m: spec.unified.minReplicas: is 4, but minReplicas must be at most maxReplicas; raise maxReplicas or lower minReplicas",
    "6: Model/m: spec.unified.replicas: is 3, but replicas must be at least minReplicas; raise replicas or lower minReplicas",
    "6: Model/m: spec.unified.replicas: is 3, but replicas must be at most maxReplicas; lower replicas or raise maxReplicas",
)
bad(
    "gpus that nobody computes with",
    model("  unified: {gpus: 4}\n"),
    "6: Model/m: spec.unified.gpus: is 4, but a worker computes on tensorParallel GPUs and would hold the others idle; set gpus to tensorParallel, or to 0 for the CPU, and raise replicas for more",
)
bad(
    "tensor parallel",
    model("  unified: {gpus: 2, tensorParallel: 2}\n"),
    "6: Model/m: spec.unified.tensorParallel: is 2, but engine.type Tandem cuts a model over processes on a CPU only, and would leave the other GPUs idle; set gpus to 0, or tensorParallel to 1 and raise replicas, or set engine.type: VLLM",
)
bad(
    "tensor parallel without gpus",
    model("  image: v\n  engine: {type: VLLM}\n  unified: {tensorParallel: 2}\n"),
    "8: Model/m: spec.unified.tensorParallel: is 2, but tensorParallel above 1 of engine.type VLLM needs gpus; set gpus to tensorParallel",
)
bad(
    "tensor parallel of any server",
    model("  image: v\n  engine: {type: OpenAI}\n  unified: {tensorParallel: 2}\n"),
    "8: Model/m: spec.unified.tensorParallel: is 2, but engine.type OpenAI is told nothing of several GPUs; set tensorParallel to 1 and name the server's own flag in engine.args",
)
bad(
    "a flag of vLLM that loads code, abbreviated",
    model(
        "  image: v\n  engine: {type: VLLM, args: {scheduler_cl: mine.Scheduler}}\n  unified: {}\n"
    ),
    "7: Model/m: spec.engine.args: engine.args holds a flag that makes vLLM load code by name (middleware, logits-processors, worker-extension-cls, tool-parser-plugin, reasoning-parser-plugin, scheduler-cls, worker-cls); build it into spec.image instead",
)
bad(
    "rollout that cannot move",
    model("  unified: {}\n  rollout: {maxSurge: 0, maxUnavailable: 0}\n"),
    "7: Model/m: spec.rollout.maxSurge: is 0, but without maxUnavailable of 1 or more nothing could move; set maxSurge: 1",
)
bad(
    "cache of a folder",
    MODEL.replace('m"}', 'm", cache: {size: 1Gi}}'),
    "5: Model/m: spec.weights.cache: cache is for downloads; remove it or use an hf:// or s3:// source",
)
bad(
    "pod patch with a typo",
    model(
        "  unified:\n    podPatch:\n"
        "      spec: {containrs: [], hostNetwork: 'yes', containers: [{name: worker, imagePul: x}]}\n"
    ),
    "8: Model/m: spec.unified.podPatch.spec.containrs: no field of a pod; did you mean containers?",
    "8: Model/m: spec.unified.podPatch.spec.hostNetwork: must be true or false, not 'yes'",
    "8: Model/m: spec.unified.podPatch.spec.containers[0].imagePul: no field of a pod; did you mean image?",
)
bad(
    "pod patch with amounts that are none",
    model(
        "  unified:\n    podPatch:\n"
        "      spec: {containers: [{name: worker, resources: {limits: {memory: 8GB, cpu: 2}}}]}\n"
    ),
    "8: Model/m: spec.unified.podPatch.spec.containers[0].resources.limits.memory: '8GB' is not a quantity; write 500m, 4, 4Gi or the like",
)
bad(
    "name with dots",
    MODEL.replace("name: m", "name: qwen2.5"),
    "3: metadata.name: 'qwen2.5' is not a name; use at most 40 lower-case letters, digits and inner dashes, such as 'qwen2-5'",
)
bad(
    "name of a prefixed Service",
    MODEL.replace("name: m", "name: tandem-7b"),
    "3: metadata.name: metadata.name may not begin with tandem- and a digit, Services of names that begin with a digit are called so; choose another",
)
bad(
    "no tiers",
    "apiVersion: tandem.dev/v1alpha1\nkind: Router\nmetadata: {name: r}\nspec: {tiers: []}\n",
    "4: Router/r: spec.tiers: has 0 items; at least 1",
)
bad(
    "tiers as a mapping",
    "apiVersion: tandem.dev/v1alpha1\nkind: Router\nmetadata: {name: r}\nspec: {tiers: {a: b}}\n",
    '4: Router/r: spec.tiers: must be a list, not a mapping; begin each item with "- "',
)
bad(
    "same tier twice",
    ROUTER.replace("name: large", "name: small"),
    "5: Router/r: spec.tiers: tier names must be unique; rename one",
)
bad(
    "tier without a model",
    ROUTER.replace(", modelRef: {name: l}", ""),
    "7: Router/r: spec.tiers[1]: a tier has either modelRef or external, exactly one of them",
)
bad(
    "tier with both",
    ROUTER.replace("{name: l}", '{name: l}, external: {url: "https://x/v1", model: b}'),
    "7: Router/r: spec.tiers[1]: a tier has either modelRef or external, exactly one of them",
)
bad(
    "unknown fallback",
    router("  fallbackTier: huge\n"),
    "8: Router/r: spec.fallbackTier: is 'huge', but fallbackTier must be the name of a tier",
)
bad(
    "embedding without its artifact",
    router('  predictor: {type: Learned, training: {data: "pvc://c/d"}, embedding: "pvc://c/e"}\n'),
    "8: Router/r: spec.predictor.embedding: is 'pvc://c/e', but embedding goes with the artifact trained with it; add artifact or remove embedding",
)
bad(
    "a cascade that nothing reads for",
    router("  cascade: {}\n"),
    "8: Router/r: spec.cascade: a cascade reads answers with the verifier of a Learned predictor; add predictor.training or predictor.artifact, or remove cascade",
)
bad(
    "a judge of a cascade that is not there",
    router("  learning: {judge: {type: ExternalInCascade, url: https://j.example/v1, model: m}}\n"),
    "8: Router/r: spec.learning.judge.type: is 'ExternalInCascade', but a judge of type ExternalInCascade is asked by spec.cascade; add cascade: {}, or write type: External",
)
bad(
    "trained from labels without their prompts",
    router('  predictor: {training: {data: "pvc://c/d", fromLabels: true}}\n'),
    "8: Router/r: spec.predictor.training.fromLabels: is True, but training from labels needs something of their prompts; set learning.capture to Features or Prompts, or fromLabels to false",
)
bad(
    "learned from nothing",
    router("  predictor: {type: Learned}\n"),
    "8: Router/r: spec.predictor.type: is 'Learned', but a Learned predictor needs artifact or training, or learning.shadowShare above 0 to gather labels for one; add one of them or use type: Length",
)
bad(
    "artifact beside Length",
    router('  predictor: {type: Length, artifact: "configmap://a"}\n'),
    "8: Router/r: spec.predictor.type: is 'Length', but artifact and training belong to type: Learned; remove them, or leave type out",
)
bad(
    "training beside Fixed",
    router('  predictor: {type: Fixed, training: {data: "file:///d"}}\n'),
    "8: Router/r: spec.predictor.type: is 'Fixed', but artifact and training belong to type: Learned; remove them, or leave type out",
)
bad(
    "threshold and floor",
    router('  threshold: "0.2"\n  objective: {qualityFloor: "0.9"}\n'),
    "8: Router/r: spec.threshold: is '0.2', but threshold and objective.qualityFloor both say where the larger tier begins; keep one: threshold stays as it is, qualityFloor moves it",
)
bad(
    "threshold beside Fixed",
    router('  threshold: "0.2"\n  predictor: {type: Fixed}\n'),
    "8: Router/r: spec.threshold: is '0.2', but threshold decides nothing beside predictor.type: Fixed, the fallback tier answers all; remove it or let another predictor choose",
)
bad(
    "minimize",
    router("  objective: {minimize: Latency}\n"),
    "8: Router/r: spec.objective.minimize: unknown field; use one of qualityFloor",
)
bad(
    "transport",
    model("  unified: {}\n  kvTransfer: {transport: inproc}\n"),
    "7: Model/m: spec.kvTransfer.transport: unknown field; use one of checksum, maxInflight, localPrefillMaxTokens",
)
bad(
    "artifact and training",
    router(
        '  predictor: {type: Learned, artifact: "configmap://a", training: {data: "file:///d"}}\n'
    ),
    "8: Router/r: spec.predictor.training: artifact and training exclude each other; keep one",
)
bad(
    "share above one",
    ROUTER.replace("{name: l}", '{name: l}, maxShare: "1.5"'),
    '7: Router/r: spec.tiers[1].maxShare: \'1.5\' is not a fraction; write a decimal between "0" and "1", such as "0.95"',
)
bad(
    "quality as a number",
    router("  objective: {qualityFloor: 0.95}\n"),
    '8: Router/r: spec.objective.qualityFloor: 0.95 is a number; this field takes text, write it quoted: "0.95"',
)
bad(
    "slo without a target",
    router("  slo: {ttft: {percentile: 95}}\n"),
    "8: Router/r: spec.slo.ttft.target: is required; add it",
)
bad(
    "percentile",
    router("  slo: {ttft: {percentile: 100, target: 1s}}\n"),
    "8: Router/r: spec.slo.ttft.percentile: 100 must be at most 99",
)
bad(
    "policy without managed",
    router("  scaling: {policyRef: {name: p}}\n"),
    "8: Router/r: spec.scaling.policyRef: policyRef is only used with mode: Managed or Advise; remove it or set one of them",
)
bad(
    "tenants without a key",
    router("  tenants: [{name: a, keyHashes: ['hmac-sha256:" + 64 * "0" + "']}]\n"),
    "4: Router/r: spec.keySecretRef: tenants with keyHashes need keySecretRef, the Secret with the key of the hashes",
)
bad(
    "key hash",
    router("  keySecretRef: {name: k}\n  tenants: [{name: a, keyHashes: [secret]}]\n"),
    "9: Router/r: spec.tenants[0].keyHashes[0]: 'secret' is too short; at least 76 characters",
)
bad(
    "url",
    ROUTER.replace("modelRef: {name: l}", 'external: {url: "api.example.com", model: b}'),
    "7: Router/r: spec.tiers[1].external.url: 'api.example.com' is not a base URL; use http:// or https://, without ? and #",
)
bad(
    "port",
    router("  port: 70000\n"),
    "8: Router/r: spec.port: 70000 must be at most 65535",
)
bad(
    "signal without its query",
    POLICY.replace("KVUtilization", "Prometheus"),
    "4: AutoscalingPolicy/p: spec.query: the signal Prometheus and the policy's query need each other; write both, or remove one",
)
bad(
    "signal twice",
    POLICY + '    - {name: KVUtilization, target: "0.9"}\n',
    "6: AutoscalingPolicy/p: spec.decode.signals: a signal may be listed once; remove the second",
)
SCHEDULE = "  schedules: [{name: day, cron: CRON, timeZone: ZONE, duration: 1h, minReplicas: 1}]\n"
bad(
    "cron line",
    POLICY + SCHEDULE.replace("CRON", '"99 99 99 99 99"').replace("ZONE", "UTC"),
    "8: AutoscalingPolicy/p: spec.schedules[0].cron: '99 99 99 99 99': bad minute; give minute (0-59) hour (0-23) day (1-31) month (1-12) weekday (0-7, 0 and 7 are Sunday)",
)
bad(
    "time zone",
    POLICY + SCHEDULE.replace("CRON", '"0 8 * * 1-5"').replace("ZONE", "Mars/Olympus"),
    "8: AutoscalingPolicy/p: spec.schedules[0].timeZone: 'Mars/Olympus' is not a time zone; use an IANA name such as UTC or Europe/Berlin",
)
bad(
    "unknown signal",
    POLICY.replace("KVUtilization", "CPU"),
    "7: AutoscalingPolicy/p: spec.decode.signals[0].name: 'CPU' is not allowed; use one of PendingPrefillTokens, KVUtilization, RunningRequests, Forecast, Prometheus",
)
bad(
    "worker pool",
    MODEL.replace("kind: Model", "kind: WorkerPool"),
    "2: WorkerPool/m: kind: WorkerPools are written by the operator; describe a Model",
)
bad(
    "merge key",
    "a: &x {b: 1}\nc: {<<: *x}\n",
    "2: c: merge keys (<<) are not part of Kubernetes YAML; write out",
)

bad(
    "a tenant without a key",
    router("  tenants: [{name: anonymous}]\n"),
    "8: Router/r: spec.tenants[0].name: is 'anonymous', but anonymous are the requests without a key; rename the tenant",
)
bad(
    "host with a port",
    router('  access: {allowedHosts: ["ai.example:8000"]}\n'),
    "8: Router/r: spec.access.allowedHosts[0]: 'ai.example:8000' is not a host; write its name or [IPv6 address], without port",
)
bad(
    "url with a query",
    ROUTER.replace("modelRef: {name: l}", 'external: {url: "https://p.example/v1?k=1", model: b}'),
    "7: Router/r: spec.tiers[1].external.url: 'https://p.example/v1?k=1' is not a base URL; use http:// or https://, without ? and #",
)
bad(
    "price beside external",
    ROUTER.replace(
        "modelRef: {name: l}",
        'usdPer1MInputTokens: "1", external: {url: "https://p.example/v1", model: b}',
    ),
    "7: Router/r: spec.tiers[1].external: the prices of an external tier are those of external; move them there",
)
bad(
    "served name with a space",
    model("  servedName: a b\n  unified: {}\n"),
    "6: Model/m: spec.servedName: 'a b' is not a model's name; use letters, digits and, inside, . _ / : -",
)
bad(
    "artifact that climbs out",
    router('  predictor: {artifact: "pvc://c/../../etc"}\n'),
    "8: Router/r: spec.predictor.artifact: is 'pvc://c/../../etc', but artifact may not lead out of what it names; write the path without ..",
)
bad(
    "target of nothing",
    POLICY.replace('"0.8"', '"0"'),
    "6: AutoscalingPolicy/p: spec.decode.signals: a target of 0 would be missed for ever; write one above 0",
)
