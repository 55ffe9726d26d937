#!/usr/bin/env bash
# A run as a workload of a GKE cluster that xpk made: one container on every host of every slice.
#
#   experiments/launch/xpk.sh [--print] image | run CMD... | stop
#
#   image   builds the container of this commit and pushes it    run   submits CMD as a workload
#   stop    deletes the workload: its hosts get SIGTERM, and the run saves
#
# --print shows the commands and runs none. The variables CLUSTER, PROJECT, ZONE and REPOSITORY (of
# container images) say where; WORKLOAD names the run, TYPE and SLICES its hardware.
# A workload that fails or is evicted is started again, up to RESTARTS times, and resumes.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."

: "${CLUSTER:?}" "${PROJECT:?}" "${ZONE:?}" "${REPOSITORY:?}"
: "${WORKLOAD:=nca}" "${TYPE:=v5p-128}" "${SLICES:=1}" "${RESTARTS:=50}"
commit=$(git describe --always --dirty --abbrev=12)
image=$REPOSITORY/nca_jax:$commit

show=
if [ "${1:-}" = --print ]; then show=1; shift; fi
act() { if [ -n "$show" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }

action=${1:-}
shift || true
case $action in
  image)
    # What is committed and nothing else: the archive is the whole build context.
    context=$(mktemp -d)
    trap 'rm -rf "$context"' EXIT
    act git archive --output="$context/nca_jax.tar" HEAD
    act tar --extract --file="$context/nca_jax.tar" --directory="$context"
    act docker build --build-arg COMMIT="$commit" --tag="$image" \
      --file="$context/experiments/launch/Dockerfile" "$context"
    act docker push "$image"
    ;;
  run)
    [ $# -gt 0 ] || { echo "run wants a command: run python -m nca_jax.train ..." >&2; exit 2; }
    # SIGTERM must come to the run itself (exec), which saves after the step that it is in: 300 s.
    act xpk workload create --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
      --workload="$WORKLOAD" --tpu-type="$TYPE" --num-slices="$SLICES" --docker-image="$image" \
      --max-restarts="$RESTARTS" --termination-grace-period-seconds=300 \
      --command="exec $(printf "%q " "$@")"
    ;;
  stop)
    act xpk workload delete --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
      --workload="$WORKLOAD"
    ;;
  *) sed -n '2,/^set/s/^# \{0,1\}//p' "$here/xpk.sh" >&2; exit 2 ;;
esac
