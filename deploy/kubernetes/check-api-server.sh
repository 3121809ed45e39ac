#!/bin/bash
# Ask a real API server of Kubernetes whether it accepts what kustomize renders. No cluster is needed, and none is touched:
# etcd and kube-apiserver start on the loopback in a temporary folder, with keys made for this call, and stop with it.
#
#     STEMTOMO_KUBE_BIN=FOLDER deploy/kubernetes/check-api-server.sh [MANIFEST.yaml ...]
#
# The folder holds kube-apiserver and etcd (one of them may lie on the PATH instead); kubectl and python with
# dask-kubernetes, whose resource definitions are installed, come from the PATH. Accepted must be every overlay and every
# given manifest; refused must be a cluster with "two" workers and a claim of a bad size. Exit code 0: so it was.
set -u
here=$(cd "$(dirname "$0")" && pwd)
PATH=${STEMTOMO_KUBE_BIN:+$STEMTOMO_KUBE_BIN:}$PATH
for program in etcd kube-apiserver kubectl openssl python; do
    command -v "$program" >/dev/null || { echo "$program is not on the PATH nor in STEMTOMO_KUBE_BIN" >&2; exit 2; }
done
manifests=()
for manifest in "$@"; do manifests+=("$(realpath "$manifest")"); done
definitions=$(python - <<'PYTHON'
import importlib.util, pathlib

found = importlib.util.find_spec("dask_kubernetes")
if found is not None:
    print(pathlib.Path(found.origin).parent / "operator/deployment/helm/dask-kubernetes-operator/crds")
PYTHON
)
[ -d "$definitions" ] || { echo "dask-kubernetes is not installed: pip install dask-kubernetes" >&2; exit 2; }

umask 077
run=$(mktemp -d) || exit 2
etcd_id='' server_id=''
stop() {
    local id
    for id in $server_id $etcd_id; do kill -TERM "$id" 2>/dev/null; wait "$id" 2>/dev/null; done
    rm -rf "$run"
}
trap stop EXIT
trap 'exit 1' INT TERM

# -- the server --------------------------------------------------------------------------------------------------------

read -r client_port peer_port port < <(python - <<'PYTHON'
import socket

sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(each.getsockname()[1] for each in sockets))
PYTHON
)
etcd --data-dir "$run/etcd" --unsafe-no-fsync --initial-cluster "default=http://127.0.0.1:$peer_port" \
    --listen-client-urls "http://127.0.0.1:$client_port" --advertise-client-urls "http://127.0.0.1:$client_port" \
    --listen-peer-urls "http://127.0.0.1:$peer_port" --initial-advertise-peer-urls "http://127.0.0.1:$peer_port" \
    >"$run/etcd.log" 2>&1 &
etcd_id=$!
openssl genrsa -out "$run/accounts.pem" 2048 2>/dev/null
token=$(openssl rand -hex 24)
echo "$token,admin,admin,system:masters" >"$run/tokens.csv"
kube-apiserver --etcd-servers="http://127.0.0.1:$client_port" --cert-dir="$run/certificates" \
    --bind-address=127.0.0.1 --secure-port="$port" --service-cluster-ip-range=10.96.0.0/24 --authorization-mode=RBAC \
    --token-auth-file="$run/tokens.csv" --service-account-issuer=https://kubernetes.default.svc \
    --service-account-key-file="$run/accounts.pem" --service-account-signing-key-file="$run/accounts.pem" \
    >"$run/kube-apiserver.log" 2>&1 &
server_id=$!

export KUBECONFIG=$run/kubeconfig
kubectl config set-cluster check --server="https://127.0.0.1:$port" \
    --certificate-authority="$run/certificates/apiserver.crt" >/dev/null
kubectl config set-credentials admin --token="$token" >/dev/null
kubectl config set-context check --cluster=check --user=admin --namespace=stemtomo >/dev/null
kubectl config use-context check >/dev/null

failed() {
    echo "$1" >&2
    tail -n 20 "$run"/*.log >&2
    exit 1
}
until kubectl get --raw /readyz >/dev/null 2>"$run/last-answer"; do
    kill -0 "$server_id" 2>/dev/null && [ "$SECONDS" -lt "${STEMTOMO_KUBE_WAIT_S:-120}" ] ||
        failed "The API server did not become ready: $(tail -n 1 "$run/last-answer")"
    sleep 0.5
done
minor=$(kubectl get --raw /version | python -c 'import json, re, sys; print(re.match(r"\d+", json.load(sys.stdin)["minor"])[0])')
kubectl apply --server-side -f "$definitions" >/dev/null || failed "The operator's definitions were not accepted."
kubectl wait --for=condition=Established --timeout=60s crd --all >/dev/null || failed "The definitions are not served."
kubectl create namespace stemtomo >/dev/null && kubectl create serviceaccount default >/dev/null ||
    failed "The namespace could not be made."  # its default account is made by a controller, which does not run here

# -- what it says ------------------------------------------------------------------------------------------------------

wrong=0
# Write the overlay $1 to $run/$1/all.yaml. Servers before 1.26 know no podFailurePolicy: it is left out there.
render() {
    mkdir -p "$run/$1"
    kubectl kustomize "$here/overlays/$1" >"$run/$1/all.yaml" || { wrong=1; return; }
    if [ "$minor" -lt 26 ]; then
        cat >"$run/$1/kustomization.yaml" <<'YAML'
resources: [all.yaml]
patches:
  - target: {kind: Job}
    patch: |
      - op: remove
        path: /spec/podFailurePolicy
YAML
        kubectl kustomize "$run/$1" >"$run/$1/old.yaml" && mv "$run/$1/old.yaml" "$run/$1/all.yaml" || wrong=1
    fi
}

accepted() {
    if kubectl apply --dry-run=server --validate=strict -f "$2" 2>&1; then echo "accepted: $1"
    else echo "REFUSED: $1"; wrong=1; fi
}

# $1: what is wrong with it; $2: the edit of overlay cpu; $3: what the refusal must say. kubectl's own validation is off.
refused() {
    sed "$2" "$run/cpu/all.yaml" >"$run/broken.yaml"
    local told
    if cmp -s "$run/cpu/all.yaml" "$run/broken.yaml"; then echo "NOT BROKEN: $1"; wrong=1
    elif told=$(kubectl apply --dry-run=server --validate=false -f "$run/broken.yaml" 2>&1); then
        echo "ACCEPTED: $1"; wrong=1
    elif grep -q "$3" <<<"$told"; then echo "refused, as it must be: $1"
    else echo "REFUSED FOR ANOTHER REASON: $1: $told"; wrong=1; fi
}

for overlay in "$here"/overlays/*/; do
    overlay=$(basename "$overlay")
    render "$overlay"
    accepted "overlay $overlay" "$run/$overlay/all.yaml"
done
for manifest in ${manifests[@]+"${manifests[@]}"}; do accepted "$manifest" "$manifest"; done
refused "replicas: two" 's/replicas: 2$/replicas: two/' 'spec.worker.replicas'
refused "a claim of 4Tonnes" 's/storage: 4Ti$/storage: 4Tonnes/' 'quantities must match'
[ "$wrong" = 0 ] && echo "Kubernetes 1.$minor: all as it must be."
[ "$minor" -ge 26 ] || echo "Not asked: podFailurePolicy of the Job, which this server does not know."
exit "$wrong"
