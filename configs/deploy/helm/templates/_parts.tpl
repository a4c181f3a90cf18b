{{/* What every pod has: no account of the cluster, no root, nothing that the systemd units would not allow either. */}}
{{- define "siloweave.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .uid }}
  runAsGroup: {{ .uid }}
  fsGroup: {{ .uid }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{- define "siloweave.container" -}}
image: {{ .values.image | quote }}
command:
{{- if .values.paused }}
  - sleep
  - infinity
{{- else }}
{{- range .command }}
  - {{ . | quote }}
{{- end }}
{{- end }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{- define "siloweave.claim" -}}
spec:
  accessModes: [ReadWriteOnce]
  {{- if .class }}
  storageClassName: {{ .class | quote }}
  {{- end }}
  resources:
    requests:
      storage: {{ .size }}
{{- end }}
