{{- define "convoy.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end -}}
{{- end }}

{{- define "convoy.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ include "convoy.name" . }}
{{- end }}

{{- define "convoy.meta" -}}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "convoy.selector" . | nindent 2 }}
  app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
  app.kubernetes.io/managed-by: {{ .Release.Service }}
  helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "convoy.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "convoy.name" .) }}
{{- end }}

{{- define "convoy.image" -}}
{{ .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ .Values.image.tag }}{{ end }}
{{- end }}

{{/* JSON's texts, numbers, lists and truth are TOML's. */}}
{{- define "convoy.toml" -}}
{{- $config := deepCopy .Values.config }}
{{- if .Values.tls.secret }}
{{- $_ := set $config "tls_cert" "/etc/convoy/tls/tls.crt" }}
{{- $_ := set $config "tls_key" "/etc/convoy/tls/tls.key" }}
{{- if .Values.tls.clientCertificates }}{{ $_ := set $config "tls_client_ca" "/etc/convoy/tls/ca.crt" }}{{ end }}
{{- end }}
{{- if .Values.tokens.secret }}{{ $_ := set $config "auth_tokens" "/etc/convoy/tokens/tokens" }}{{ end }}
{{- range $key, $value := $config }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{- end }}

{{/* preStop, both parts of the drain, and five seconds in which engines end. */}}
{{- define "convoy.grace" -}}
{{ add .Values.preStopSeconds (ceil .Values.config.drain_seconds) (ceil .Values.config.drain_timeout_seconds) 5 }}
{{- end }}

{{/* A probe's action; the argument is (dict "top" . "live" true|false). */}}
{{- define "convoy.probe" -}}
{{- $tls := .top.Values.tls }}
{{- if and $tls.secret $tls.clientCertificates }}
tcpSocket:
  port: grpc
{{- else if $tls.secret }}
httpGet:
  scheme: HTTPS
  path: /v2/health/{{ ternary "live" "ready" .live }}
  port: http
{{- else }}
grpc:
  port: 8001
  service: {{ ternary "grpc.health.v1.Health" "" .live | quote }}
{{- end }}
{{- end }}

{{- define "convoy.modelVolume" -}}
{{- with .Values.modelRepository }}
{{- if eq .from "claim" }}
persistentVolumeClaim:
  claimName: {{ .claim }}
  readOnly: true
{{- else if eq .from "volume" }}
{{- toYaml (required "modelRepository.from is volume, so modelRepository.volume must be given" .volume) }}
{{- else if eq .from "image" }}
emptyDir:
  sizeLimit: {{ .size }}
{{- end }}
{{- end }}
{{- end }}

{{- define "convoy.scaling" -}}
scaleUp:
  stabilizationWindowSeconds: 0
  selectPolicy: Max
  policies:
    - {type: Percent, value: 100, periodSeconds: 30}
    - {type: Pods, value: 2, periodSeconds: 30}
scaleDown:
  stabilizationWindowSeconds: 300
  policies:
    - {type: Percent, value: 25, periodSeconds: 60}
{{- end }}

{{- define "convoy.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "convoy.resources" -}}
{{- $resources := deepCopy .Values.resources }}
{{- if .Values.gpu.count }}
{{- $_ := set $resources "limits" (merge (dict .Values.gpu.resource .Values.gpu.count) ($resources.limits | default dict)) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{- define "convoy.trigger" -}}
metadata:
  serverAddress: {{ .keda.serverAddress }}
  query: {{ .query | quote }}
  threshold: {{ .threshold | toString | quote }}
  activationThreshold: "0"
{{- with .keda.authentication }}
authenticationRef:
  name: {{ . }}
{{- end }}
{{- end }}
