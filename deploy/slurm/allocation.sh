# What the batch scripts of this folder share. They read it from STEMTOMO_SLURM, or from deploy/slurm below the folder
# in which sbatch was called. Variables that a site may set:
#
#     STEMTOMO_SLURM       this folder
#     STEMTOMO_SCRATCH     fast local disk of a node, for what workers spill; SLURM_TMPDIR, TMPDIR or /tmp if not given
#     STEMTOMO_INTERFACE   network between the nodes, such as ib0; the one of the host name if not given
#     STEMTOMO_RESTARTS    how often a job that did not finish puts itself into the queue again; 20 if not given
#     STEMTOMO_GRACE_S     seconds from the warning to the end without a checkpoint; 90 if not given

# Parallelism comes from parts and tilts: libraries below must not start threads of their own.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1

cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
scratch=${STEMTOMO_SCRATCH:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}/stemtomo-${SLURM_JOB_ID:-$$}

# The warning before the end of the walltime may come at any moment; it is handed on to the command that is waited for.
warned='' work='' cluster=''
trap 'warned=yes; [ -z "$work" ] || kill -TERM "$work" 2>/dev/null' TERM USR1

# Memory of the job on a node in MiB: as it was asked for, else what the node has.
memory_mib() {
    if [ "${SLURM_MEM_PER_NODE:-0}" -gt 0 ]; then echo "$SLURM_MEM_PER_NODE"
    elif [ "${SLURM_MEM_PER_CPU:-0}" -gt 0 ]; then echo $((SLURM_MEM_PER_CPU * ${SLURM_CPUS_ON_NODE:-1}))
    else awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo; fi
}

# Run a command, hand the warning on to it, and return its exit code.
warnable() {
    "$@" &
    work=$!
    [ -z "$warned" ] || kill -TERM "$work" 2>/dev/null  # it came before there was anything to warn
    while kill -0 "$work" 2>/dev/null; do wait "$work"; done  # a signal ends a wait early
    wait "$work"
    local code=$?
    work=''
    return "$code"
}

run_stemtomo() {
    warnable stemtomo "$@" --grace-s "${STEMTOMO_GRACE_S:-90}"
}

# Leave with the exit code $1 of stemtomo; a job that was warned and did not finish (75) goes back into the queue. One
# that somebody cancels is signalled as well, but does not count as running any more, and stays cancelled.
leave() {
    local code=$1
    [ "$code" = 143 ] && [ -n "$warned" ] && code=75  # the warning ended it before it could listen
    if [ "$code" = 75 ] && [ -n "$warned" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${STEMTOMO_RESTARTS:-20}" ]; then
        case $(scontrol show job --oneliner "$SLURM_JOB_ID") in
            *" JobState=RUNNING "*)
                echo "Not finished: job $SLURM_JOB_ID goes back into the queue."
                scontrol requeue "$SLURM_JOB_ID" ;;
            *) echo "Not finished: submit it again to continue." ;;
        esac
    fi
    exit "$code"
}

# -- a Dask cluster inside of the allocation ---------------------------------------------------------------------------

# Start a scheduler here and `$2 ...` (dask worker, dask cuda worker) on every node as one step each; $1 is the number
# of workers to wait for. They talk TLS with a key of this job alone, so that nobody else on the network can hand them
# work. Whatever ends early, a cancelled step or a lost worker process, is started again.
start_cluster() {
    local wanted=$1; shift
    rm -rf "${SLURM_SUBMIT_DIR:-.}/.stemtomo-$SLURM_JOB_ID-"??????  # of this job before it was requeued
    shared=$(mktemp -d "${SLURM_SUBMIT_DIR:-.}/.stemtomo-$SLURM_JOB_ID-XXXXXX") || exit 2  # seen by all nodes, ours alone
    shared=$(realpath "$shared")
    trap stop_cluster EXIT
    openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj "/CN=stemtomo-$SLURM_JOB_ID" \
        -keyout "$shared/key.pem" -out "$shared/certificate.pem" 2>/dev/null || exit 2
    export DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION=True DASK_DISTRIBUTED__COMM__TLS__CA_FILE=$shared/certificate.pem
    local role
    for role in SCHEDULER WORKER CLIENT; do
        export "DASK_DISTRIBUTED__COMM__TLS__${role}__CERT=$shared/certificate.pem"
        export "DASK_DISTRIBUTED__COMM__TLS__${role}__KEY=$shared/key.pem"
    done
    dask scheduler --protocol tls --port 0 --no-dashboard --dashboard-address 127.0.0.1:0 ${STEMTOMO_INTERFACE:+--interface "$STEMTOMO_INTERFACE"} \
        --scheduler-file "$shared/scheduler.json" >"$shared/scheduler.log" 2>&1 &
    cluster=$!
    local node
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        keep_worker "$node" "$@" &
        cluster="$cluster $!"
    done
    warnable python -c "$wait_for_workers" "$shared/scheduler.json" "$wanted"
    [ -z "$warned" ] || leave 75  # nothing is lost: nothing has begun
}

wait_for_workers='
import pathlib, sys, time
from distributed import Client

file, wanted, deadline = pathlib.Path(sys.argv[1]), int(sys.argv[2]), time.monotonic() + 600
while not file.exists() and time.monotonic() < deadline:
    time.sleep(0.2)
with Client(scheduler_file=str(file)) as client:
    client.wait_for_workers(wanted, timeout=600)
'

keep_worker() {
    local node=$1; shift
    until [ -e "$shared/done" ]; do
        srun --nodes=1 --ntasks=1 --nodelist="$node" --cpus-per-task="$cpus" --kill-on-bad-exit=0 \
            "$@" --scheduler-file "$shared/scheduler.json" --protocol tls --no-dashboard --dashboard-address 127.0.0.1:0 \
            --death-timeout 600 \
            --local-directory "$scratch" ${STEMTOMO_INTERFACE:+--interface "$STEMTOMO_INTERFACE"} \
            >>"$shared/worker-$node.log" 2>&1
        [ -e "$shared/done" ] || { echo "The worker step on $node ended; it is started again."; sleep 1; }
    done
}

stop_cluster() {
    touch "$shared/done"
    local id
    for id in $cluster; do pkill -TERM -P "$id" 2>/dev/null; kill -TERM "$id" 2>/dev/null; done
    wait 2>/dev/null
    srun --ntasks-per-node=1 rm -rf "$scratch" 2>/dev/null  # what a killed worker had spilled
    if [ -n "${STEMTOMO_KEEP_LOGS:-}" ]; then rm -f "$shared"/*.pem; else rm -rf "$shared"; fi
}
