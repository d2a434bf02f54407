{{- /* `helm upgrade --reuse-values` from an earlier release brings that release's values alone: what it
       did not know yet gets this release's defaults. Where every section is there, an absent value is
       one that somebody set to null. */}}
{{- define "tandem.values" -}}
{{- $defaults := .Files.Get "files/defaults.yaml" | fromYaml -}}
{{- $values := .Values -}}
{{- $earlier := dict -}}
{{- range $section, $_ := $defaults }}{{ if not (hasKey $values $section) }}{{ $_ := set $earlier $section true }}{{ end }}{{ end -}}
{{- if $earlier -}}
{{- range $section, $default := $defaults -}}
{{- if hasKey $earlier $section -}}
{{- $_ := set $values $section $default -}}
{{- else if kindIs "map" $default -}}
{{- range $name, $value := $default -}}
{{- if not (hasKey (get $values $section) $name) }}{{ $_ := set (get $values $section) $name $value }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "tandem.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}-operator
{{- end -}}

{{- define "tandem.selector" -}}
app.kubernetes.io/name: tandem-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "tandem.labels" -}}
{{ include "tandem.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "tandem.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "tandem.name" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- /* The namespaces that are looked after, as a JSON list; empty means all. */}}
{{- define "tandem.namespaces" -}}
{{- $found := .Values.operator.watchNamespaces | default list -}}
{{- with .Values.operator.watchNamespace }}{{ $found = append $found . }}{{ end -}}
{{- toJson (uniq $found) -}}
{{- end -}}

{{- /* An image by its name in `images`: below the registry, and by digest where one is given. */}}
{{- define "tandem.image" -}}
{{- $image := get .root.Values.images .name -}}
{{- with .root.Values.images.registry }}{{ $image = printf "%s/%s" (trimSuffix "/" .) $image }}{{ end -}}
{{- with get (.root.Values.images.digests | default dict) .name -}}
{{- $image = printf "%s@%s" (regexReplaceAll ":[^:/@]+$" $image "") . -}}
{{- end -}}
{{- $image -}}
{{- end -}}

{{- define "tandem.podDefaults" -}}
{{- $pods := merge (dict "pullSecrets" .Values.images.pullSecrets) .Values.podDefaults -}}
{{- $_ := set $pods "workerAnnotations" .Values.serviceAccount.workerAnnotations -}}
{{- $_ := set $pods "routerAnnotations" .Values.serviceAccount.routerAnnotations -}}
{{- toJson $pods -}}
{{- end -}}

{{- /* Values that are fine one by one and cannot work together; each fails with what to do. */}}
{{- define "tandem.check" -}}
{{- if and (not .Values.serviceAccount.create) (not .Values.serviceAccount.name) -}}
{{- fail "serviceAccount.create=false needs serviceAccount.name; name an existing ServiceAccount, or set serviceAccount.create=true" -}}
{{- end -}}
{{- if and (not .Values.serviceAccount.create) .Values.serviceAccount.annotations -}}
{{- fail "serviceAccount.annotations are for a ServiceAccount that the chart makes; annotate yours yourself, or set serviceAccount.create=true" -}}
{{- end -}}
{{- if and (not .Values.crds.install) (not (.Capabilities.APIVersions.Has "tandem.dev/v1alpha1/Model")) -}}
{{- fail "crds.install=false, but the cluster does not know Models; apply the definitions first (kubectl apply --server-side -f charts/tandem/files/crds), or set crds.install=true" -}}
{{- end -}}
{{- if and .Values.metrics.podMonitor .Values.metrics.serviceMonitor -}}
{{- fail "metrics.podMonitor and metrics.serviceMonitor would both have every pod scraped; set metrics.podMonitor=false" -}}
{{- end -}}
{{- $monitored := or .Values.metrics.podMonitor .Values.metrics.serviceMonitor -}}
{{- if and .Values.metrics.labels (not $monitored) (not .Values.metrics.alerts) -}}
{{- fail "metrics.labels are for monitors and alerts; set metrics.podMonitor=true, or remove the labels" -}}
{{- end -}}
{{- if and .Values.images.pullSecrets (eq .Values.images.pullPolicy "Never") -}}
{{- fail "images.pullPolicy=Never pulls nothing, so images.pullSecrets cannot be used; remove them, or set images.pullPolicy=IfNotPresent" -}}
{{- end -}}
{{- $namespaces := include "tandem.namespaces" . | fromJsonArray -}}
{{- if and .Values.operator.watchNamespace .Values.operator.watchNamespaces -}}
{{- fail "operator.watchNamespace is the list of one that earlier releases had; put it into operator.watchNamespaces" -}}
{{- end -}}
{{- if and (has .Release.Namespace $namespaces) (not .Values.allow.ownNamespace) -}}
{{- fail (printf "operator.watchNamespaces=%s is the operator's own namespace, where Models and Routers are refused; install into another one, or set allow.ownNamespace=true" .Release.Namespace) -}}
{{- end -}}
{{- if and .Values.networkPolicies.enabled $monitored (not .Values.networkPolicies.metricsFrom) -}}
{{- fail "networkPolicies.metricsFrom is empty, so that Prometheus could not scrape; name its namespace there, or set metrics.podMonitor=false" -}}
{{- end -}}
{{- if and .Values.networkPolicies.egressTo (not .Values.networkPolicies.restrictEgress) -}}
{{- fail "networkPolicies.egressTo opens what restrictEgress closes; set networkPolicies.restrictEgress=true, or remove egressTo" -}}
{{- end -}}
{{- $ingress := .Values.routers.ingress -}}
{{- $route := .Values.routers.httpRoute -}}
{{- range $name, $host := dict "ingress" $ingress.host "httpRoute" $route.host -}}
{{- if and $host (not (contains "{namespace}" $host)) (ne (len $namespaces) 1) -}}
{{- fail (printf "routers.%s.host=%s is the same for Routers of one name in two namespaces; write {namespace} into it, or set operator.watchNamespaces to one" $name $host) -}}
{{- end -}}
{{- end -}}
{{- if and (not $ingress.host) (or $ingress.className $ingress.annotations $ingress.tlsSecret $ingress.clusterIssuer) -}}
{{- fail "routers.ingress has no host, so that no Ingress is made; set routers.ingress.host, or remove the rest" -}}
{{- end -}}
{{- if and $ingress.clusterIssuer (not $ingress.tlsSecret) -}}
{{- fail "routers.ingress.clusterIssuer makes a certificate for routers.ingress.tlsSecret; name that Secret, such as {router}-tls" -}}
{{- end -}}
{{- if and $ingress.tlsSecret (not (contains "{router}" $ingress.tlsSecret)) $ingress.clusterIssuer -}}
{{- fail "routers.ingress.tlsSecret is made per Router; write {router} into its name" -}}
{{- end -}}
{{- if and $route.host (not $route.parentRefs) -}}
{{- fail "routers.httpRoute.host needs routers.httpRoute.parentRefs; name the Gateway that takes requests in" -}}
{{- end -}}
{{- if and $route.parentRefs (not $route.host) -}}
{{- fail "routers.httpRoute has no host, so that no HTTPRoute is made; set routers.httpRoute.host, or remove the rest" -}}
{{- end -}}
{{- if and $route.host (not (.Capabilities.APIVersions.Has "gateway.networking.k8s.io/v1/HTTPRoute")) -}}
{{- fail "routers.httpRoute.host needs Gateway API, which the cluster does not know; install its definitions first, or use routers.ingress" -}}
{{- end -}}
{{- if and .Values.routers.inferencePools (not (.Capabilities.APIVersions.Has "inference.networking.k8s.io/v1/InferencePool")) -}}
{{- fail "routers.inferencePools needs the Gateway API Inference Extension, which the cluster does not know; install its definitions first" -}}
{{- end -}}
{{- range $kind, $limit := (.Values.operator.resources | default dict).limits | default dict -}}
{{- if and (eq $kind "nvidia.com/gpu") $limit -}}
{{- fail "operator.resources.limits asks for a GPU, which the operator never uses; remove it, and set gpus on a Model's roles" -}}
{{- end -}}
{{- end -}}
{{- end -}}
