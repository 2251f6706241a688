#!/usr/bin/env bash
# Trains on one slice of Cloud TPU VMs: asks for it, waits, installs this commit on all its hosts, trains, and begins again after a preemption.
#
#   NAME=small ZONE=us-east5-a TYPE=v5p-16 launch/tpu_vm.sh --config=configs/small.py --workdir=gs://BUCKET/runs/small ...
#
#   NAME ZONE TYPE    of the queued resource, and its accelerator type
#                     the service account of the hosts must be able to read and write the bucket
#   RUNTIME           its software, v2-alpha-tpuv5 unless set         SPOT=1    preemptible, and cheaper
#   POLL_SECONDS      between two looks at the queue, 30 unless set
#
# Ctrl-C saves and stops. The training does not need this script to stay connected: the same command finds it again, or resumes it.
# shellcheck disable=SC2016 # what stands in single quotes is for the hosts
set -euo pipefail

say() { echo "tpu_vm.sh: $1" >&2; }
usage='usage: NAME=... ZONE=... TYPE=... launch/tpu_vm.sh --config=FILE --workdir=gs://BUCKET/FOLDER'
for variable in NAME ZONE TYPE; do
  if [[ -z ${!variable:-} ]]; then
    say "$variable is not set; $usage"
    exit 2
  fi
done
if (($# == 0)); then
  say "no flags of train; $usage"
  exit 2
fi
if ! command -v gcloud >/dev/null; then
  say 'gcloud is not installed, or not in PATH'
  exit 2
fi
cd "$(dirname "$0")/.."

queued() { gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" --quiet "${@:2}"; }
on() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --quiet --worker="$1" --command="$2" </dev/null; }

state() {
  local said
  if said=$(queued describe --format='value(state.state)' 2>&1); then
    echo "${said##*$'\n'}"
  elif [[ $said == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo UNKNOWN # no connection, for now
  fi
}

wait_until_active() {
  local now before=''
  while now=$(state) && [[ $now != ACTIVE ]]; do
    [[ $now == "$before" ]] || say "$NAME: $now"
    before=$now
    case $now in
      NONE) queued create --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="${RUNTIME:-v2-alpha-tpuv5}" ${SPOT:+--spot} ;;
      SUSPENDED) queued delete --force ;; # preempted
      FAILED)
        say "$NAME: not granted; gcloud compute tpus queued-resources describe $NAME --zone=$ZONE tells why"
        exit 1
        ;;
    esac
    sleep "${POLL_SECONDS:-30}"
  done
}

files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT
git archive --format=tar.gz --output="$files/mtp_jax.tar.gz" HEAD
cat >"$files/run" <<END
{ # read as a whole, because the next connection writes this file again
  cd mtp_jax
  # all-to-all, which experts need, runs beside products: README.md, "Options of the compiler"
  export LIBTPU_INIT_ARGS="--xla_tpu_enable_async_all_to_all=true \${LIBTPU_INIT_ARGS:-}"
  ../venv/bin/python -m mtp_jax train$(printf ' %q' "$@") &
  echo \$! >../pid
  wait \$!
  echo \$? >../code
  exit
}
END

running='kill -0 "$(cat pid 2>/dev/null)" 2>/dev/null'

install() {
  gcloud compute tpus tpu-vm scp "$files/mtp_jax.tar.gz" "$files/run" "$NAME:." --zone="$ZONE" --quiet --worker=all &&
    on all "$running && exit
      set -e
      mkdir -p mtp_jax && tar -xzf mtp_jax.tar.gz -C mtp_jax
      python3 -m pip install --quiet --user uv # brings a Python that is new enough
      test -x venv/bin/python || ~/.local/bin/uv venv --quiet --python=3.12 venv
      ~/.local/bin/uv pip install --quiet --python=venv/bin/python './mtp_jax[tpu,data,gcs]'"
}

# On every host: starts the training unless it runs already, and tells its log until it ends.
follow="$running || {
  rm -f pid code
  nohup bash run >log 2>&1 </dev/null &
  for _ in {1..50}; do test -s pid && break || sleep 0.2; done
}
tail -n +1 -f --pid=\"\$(cat pid)\" log
for _ in 1 2 3 4 5; do test -s code || sleep 1; done"

stop() {
  stopping=1
  say 'stopping: all hosts save'
  on 0 'kill -TERM "$(cat pid)"' || true # one is enough
}

stopping='' failures=0
while :; do
  wait_until_active
  code=''
  if install; then
    trap stop INT TERM
    set -m # so that Ctrl-C reaches this script alone
    on all "$follow" &
    set +m
    while kill -0 $! 2>/dev/null; do wait $! || true; done
    trap - INT TERM
    code=$(on all 'echo "exit code $(cat code)"' | sed -n 's/.*exit code \([0-9][0-9]*\).*/\1/p' | sort -n | tail -n 1) || true # the highest
  fi
  case $code in
    0 | 2)
      say "exit code $code; the TPU is kept until: gcloud compute tpus queued-resources delete $NAME --zone=$ZONE --force"
      exit "$code"
      ;;
    143) say 'stopped and saved' ;;
    *)
      say "$NAME: ${code:+exit code }${code:-lost}"
      if [[ -n $code || $(state) == ACTIVE ]]; then # else it was preempted, or this machine has no network
        failures=$((failures + 1))
        ((failures <= 3)) || exit 1
      fi
      ;;
  esac
  [[ -z $stopping ]] || exit "${code:-1}"
  sleep "${POLL_SECONDS:-30}"
done
