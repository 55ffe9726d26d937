#!/usr/bin/env bash
# A run on the hosts of one TPU slice, by gcloud: every host runs the same command.
#
#   experiments/launch/tpu_vm.sh [--print] create | install | run CMD... | log | stop | delete
#
#   create   makes the slice            install  puts this commit and its packages on every host
#   run      starts CMD on every host   log      follows the first host's output
#   stop     SIGTERM to every host: the run saves, says so and ends    delete   gives the slice back
#
# --print shows the commands and runs none. CMD goes on when the connection is lost. The variables
# ZONE and TPU say where and which; TYPE and IMAGE are read by create.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."

: "${TPU:=nca}" "${ZONE:=us-east5-a}" "${TYPE:=v5p-128}" "${IMAGE:=v2-alpha-tpuv5}"
bundle=nca_jax.bundle

show=
if [ "${1:-}" = --print ]; then show=1; shift; fi
act() { if [ -n "$show" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
tpu() { act gcloud compute tpus tpu-vm "$1" "$TPU" --zone="$ZONE" "${@:2}"; }
everywhere() { tpu ssh --worker=all --command="$1"; }

action=${1:-}
shift || true
case $action in
  create) tpu create --accelerator-type="$TYPE" --version="$IMAGE" ;;
  delete) tpu delete ;;
  install)
    # A bundle keeps the commit, which run.json records. The image's own Python is older than 3.11.
    act git bundle create "$bundle" HEAD
    act gcloud compute tpus tpu-vm scp "$bundle" "$TPU": --zone="$ZONE" --worker=all
    everywhere "set -e; rm -rf nca_jax; git clone -q $bundle nca_jax; cd nca_jax
python3 -m pip install -q --user uv; python3 -m uv venv -q --python 3.11 .venv
python3 -m uv pip install -q --require-hashes -r requirements.lock
python3 -m uv pip install -q --no-build-isolation -e '.[tpu,gcs]'"
    ;;
  run)
    [ $# -gt 0 ] || { echo "run wants a command: run python -m nca_jax.train ..." >&2; exit 2; }
    command=$(printf '%q ' "$@")
    everywhere "cd nca_jax; export PATH=\$PWD/.venv/bin:\$PATH
nohup $command > ../nca_jax.log 2>&1 < /dev/null & echo \$! > ../nca_jax.pid"
    ;;
  log) tpu ssh --worker=0 --command="tail -n 100 -f nca_jax.log" ;;
  stop) everywhere "kill -TERM \$(cat nca_jax.pid)" ;;
  *) sed -n '2,/^set/s/^# \{0,1\}//p' "$here/tpu_vm.sh" >&2; exit 2 ;;
esac
