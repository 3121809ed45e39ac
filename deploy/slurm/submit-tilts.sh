#!/bin/bash
# Submit a series with its tilts as an array: frames into the store, then one job per tilt, then all that follows.
#
#     deploy/slurm/submit-tilts.sh TILTS SERIES.toml [options of `stemtomo run`]
#
# TILTS is the number of tilts; STEMTOMO_AT_ONCE limits how many of them run at the same time, STEMTOMO_SBATCH holds
# options of sbatch for all jobs, such as "--partition=long --mem=32G".
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: submit-tilts.sh TILTS SERIES.toml [options]" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
export STEMTOMO_SLURM=$here
tilts=$1; shift
first=$(sbatch --parsable ${STEMTOMO_SBATCH:-} "$here/run.sbatch" "$@" --until quicklook)
each=$(sbatch --parsable ${STEMTOMO_SBATCH:-} --dependency="afterok:$first" --kill-on-invalid-dep=yes \
    --array="0-$((tilts - 1))${STEMTOMO_AT_ONCE:+%$STEMTOMO_AT_ONCE}" "$here/tilts.sbatch" "$@")
last=$(sbatch --parsable ${STEMTOMO_SBATCH:-} --dependency="afterok:$each" --kill-on-invalid-dep=yes "$here/run.sbatch" "$@")
echo "Frames: job $first. Tilts: array $each. The rest: job $last."
