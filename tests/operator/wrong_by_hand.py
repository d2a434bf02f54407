"""Objects that people got wrong by hand: what they wrote, and what the apiserver has to answer.

Typing, units, names, references and roles; each was applied to a real cluster. REFUSED are held
against one (test_objects.py) and local mode; TOLD are taken and become a condition with the next
step (test_wrong_by_hand.py).
"""

from __future__ import annotations

from objects_table import MODEL, POLICY, ROUTER, model, router

REFUSED: dict[str, tuple[str, str]] = {}
TOLD: dict[str, tuple[str, str, str]] = {}
_EXTERNAL = "external: {url: 'https://b.example/v1', model: b}"


def _role(fields: str) -> str:
    return model(f"  unified: {{{fields}}}\n")


def _source(uri: str) -> str:
    return MODEL.replace("file:///models/m", uri)


def _tier(text: str) -> str:
    return ROUTER.replace("{name: large, modelRef: {name: l}}", f"{{{text}}}")


def _policy(text: str) -> str:
    return POLICY.split("spec:")[0] + "spec:\n" + text


_NO_SOURCE = "is not a weights URI; use hf://, s3://, pvc://, image:/// or file://"
_NO_DURATION = 'is not a duration; write a number with a unit, such as "500ms", "30s" or "5m"'
_NO_NUMBER = 'is not a decimal number; write something like "1.25"'
_NO_FRACTION = 'is not a fraction; write a decimal between "0" and "1", such as "0.95"'
_NO_NAME = "is not a name; use lower-case letters, digits and inner dashes, at most 63"

# Of another type than the schema's the apiserver says so itself, with the path.
for _name, _text, _sentence in (
    ("replica of a role", _role("replica: 1"), 'unknown field "spec.unified.replica"'),
    ("role without an i", model("  unifed: {}\n"), 'unknown field "spec.unifed"'),
    ("source without a colon", _source("hf//org/name"), _NO_SOURCE),
    ("source in upper case", _source("HF://org/name"), _NO_SOURCE),
    ("source of a browser", _source("https://huggingface.co/org/name"), _NO_SOURCE),
    ("count in quotes", _role("replicas: '2'"), "spec.unified.replicas in body must be of type"),
    ("count below none", _role("replicas: -1"), "should be greater than or equal to 0"),
    ("timeout of 30", model("  unified: {}\n  drain: {timeout: 30}\n"), "must be of type string"),
    ("timeout of 30 s", model("  unified: {}\n  drain: {timeout: '30 s'}\n"), _NO_DURATION),
    ("timeout of 5min", model("  unified: {}\n  drain: {timeout: 5min}\n"), _NO_DURATION),
    ("price without quotes", _role("usdPerHour: 1.5"), "must be of type string"),
    ("price in dollars", _role("usdPerHour: '$2'"), _NO_NUMBER),
    ("price with a comma", _role("usdPerHour: '1,50'"), _NO_NUMBER),
    ("context of 32k", model("  engine: {maxModelLen: 32k}\n  unified: {}\n"), "type integer"),
    ("fp16", model("  engine: {dtype: fp16}\n  unified: {}\n"), '"bfloat16", "float16"'),
    ("60 letters", MODEL.replace("name: m", f"name: {'a' * 60}"), "at most 40 characters"),
    ("label true", _role("nodeSelector: {gpu: true}"), "must be of type string"),
    ("list of patches", _role("podPatch: [{op: add}]"), "must be of type object"),
    ("gpu alone", _role("gpus: 1, gpuResource: gpu"), "write one such as nvidia.com/gpu"),
    ("memory in GB", _role("resources: {memory: 8GB}"), "is not a quantity; write a number such"),
    (
        "name of two words",
        model("  unified: {}\n  servedName: 'my model'\n"),
        "is not a model's name; use letters, digits and",
    ),
    ("tier of two words", _tier(f"name: Big Tier, {_EXTERNAL}"), _NO_NAME),
    ("tier of both", _tier(f"name: l, modelRef: {{name: l}}, {_EXTERNAL}"), "exactly one of them"),
    ("Model as text", _tier("name: l, modelRef: l"), "must be of type object"),
    ("Model of another namespace", _tier("name: l, modelRef: {name: other/l}"), _NO_NAME),
    (
        "address without a scheme",
        _tier("name: l, external: {url: api.example.com/v1, model: b}"),
        "is not a base URL; use http:// or https://",
    ),
    ("share without quotes", _tier(f"name: l, maxShare: 0.5, {_EXTERNAL}"), "of type string"),
    ("share in percent", _tier(f"name: l, maxShare: '50%', {_EXTERNAL}"), _NO_FRACTION),
    ("floor in percent", router("  objective: {qualityFloor: '95%'}\n"), _NO_FRACTION),
    ("floor above all", router("  objective: {qualityFloor: '1.5'}\n"), _NO_FRACTION),
    ("goal of speed", router("  objective: {minimize: Latency}\n"), "spec.objective.minimize"),
    ("fallback misspelt", router("  fallbackTier: lrage\n"), "must be the name of a tier"),
    ("target of 500", router("  slo: {ttft: {target: 500}}\n"), "must be of type string"),
    (
        "every single request",
        router("  slo: {ttft: {percentile: 100, target: 1s}}\n"),
        "should be less than or equal to 99",
    ),
    ("debt", router("  budget: {usdPerHour: '-1'}\n"), _NO_NUMBER),
    ("half a GPU", router("  budget: {gpus: 2.5}\n"), "must be of type int64"),
    (
        "lower case",
        router("  budget: {usdPerHour: '1', onExhausted: downgrade}\n"),
        'supported values: "Downgrade", "Queue", "Reject"',
    ),
    ("a thousand routers", router("  replicas: 1000\n"), "should be less than or equal to 100"),
    (
        "one slash too few",
        router("  predictor: {artifact: 'configmap:/x'}\n"),
        "is not a data URI; use configmap://, pvc://, image:/// or file://",
    ),
    (
        "two stores",
        router("  store: {postgres: {secretRef: {name: s, key: k}}, sqlite: {}}\n"),
        "a store is either sqlite or postgres, exactly one of them",
    ),
    ("name for a Service", router("  serviceType: ExternalName\n"), '"NodePort", "LoadBalancer"'),
    ("mode in lower case", router("  scaling: {mode: managed}\n"), '"Managed", "External"'),
    ("signal of GPUs", POLICY.replace("KVUtilization", "GPUUtil"), '"KVUtilization", "RunningRe'),
    ("target without quotes", POLICY.replace('"0.8"', "0.8"), "must be of type string"),
    ("target of none", POLICY.replace('"0.8"', '"0"'), "would be missed for ever"),
    ("role of a policy", POLICY.replace("decode:", "worker:"), 'unknown field "spec.worker"'),
    ("asleep after 300", _policy("  idle: {scaleToZero: true, after: 300}\n"), "of type string"),
):
    REFUSED[_name] = (_text, _sentence)

for _name, _text, _reason, _sentence in (
    (
        "Secret of weights that nobody made",
        MODEL.replace(
            '{source: "file:///models/m"}', "{source: 'hf://o/n', secretRef: {name: nope}}"
        ),
        "SecretMissing",
        "there is no Secret nope; create it and allow its use: kubectl label secret nope",
    ),
    (
        "key of a provider that nobody made",
        _tier(f"name: l, {_EXTERNAL[:-1]}, apiKeySecretRef: {{name: nope, key: k}}}}"),
        "SecretMissing",
        "there is no Secret nope; create it",
    ),
    (
        "database that nobody made",
        router("  store: {postgres: {secretRef: {name: nope, key: k}}}\n"),
        "SecretMissing",
        "there is no Secret nope; create it",
    ),
    (
        "image of two tags",
        model("  image: 'tandem/worker:a:b'\n  unified: {}\n"),
        "ImageNotAllowed",
        "set allow.images={tandem/worker:a:b} in the chart",
    ),
    (
        "name of a pod",
        _role("podPatch: {metadata: {name: me}}"),
        "FieldNotAllowed",
        "podPatch.metadata.name may not be patched; remove it",
    ),
    (
        "container without an image",
        _role("podPatch: {spec: {containers: [{name: side}]}}"),
        "FieldNotAllowed",
        "is called 'side', which is none of",
    ),
    (
        "lots of memory",
        _role(
            "podPatch: {spec: {containers: [{name: worker, resources: {limits: {memory: lots}}}]}}"
        ),
        "Invalid",
        "resources.limits.memory: 'lots' is not a quantity; write 500m, 4, 4Gi",
    ),
    (
        "Model that is not there",
        ROUTER,
        "ModelMissing",
        "no Model s, l in this namespace; create it or correct modelRef",
    ),
    (
        "address inside the cluster",
        _tier("name: l, external: {url: 'http://10.0.0.1:8000/v1', model: b}"),
        "AddressNotAllowed",
        "use a public one, or set allow.externalNetworks={CIDR} in the chart",
    ),
    (
        "policy that is not there",
        router("  scaling: {mode: Managed, policyRef: {name: nope}}\n"),
        "PolicyMissing",
        "no AutoscalingPolicy nope in this namespace, so built-in values hold; create it",
    ),
    (
        "minute 61",
        _policy("  schedules: [{name: a, cron: '61 * * * *', duration: 1h, minReplicas: 1}]\n"),
        "Invalid",
        "spec.schedules[0].cron: '61 * * * *': bad minute; give minute (0-59)",
    ),
    (
        "time of Mars",
        _policy(
            "  schedules: [{name: a, cron: '1 * * * *', timeZone: Mars/Phobos, duration: 1h,"
            " minReplicas: 1}]\n"
        ),
        "Invalid",
        "is not a time zone; use an IANA name such as UTC or Europe/Berlin",
    ),
):
    TOLD[_name] = (_text, _reason, _sentence)
