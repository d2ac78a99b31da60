#!/bin/bash
# The same command on every host of a TPU slice; the processes find each other by the slice's metadata.
#   TPU=my-v5p-64 ZONE=us-east5-a scripts/launch/tpu-pod.sh
# Set: TPU and ZONE of a slice that exists, SHARED, and the command at the end. To make one:
#   gcloud compute tpus tpu-vm create "$TPU" --zone "$ZONE" --accelerator-type v5p-64 --version v2-alpha-tpuv5
set -euo pipefail
: "${TPU:?name of the TPU slice}" "${ZONE:?its zone}"

# A folder that is mounted on every host (Filestore over NFS, say): models, data, checkpoints. A bucket mounted with
# gcsfuse does not do for --output_dir, because checkpoints are renamed into place.
SHARED=${SHARED:-/mnt/shared}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$1"
}

on_all_hosts "test -d $SHARED || { echo '$SHARED is not mounted' >&2; exit 1; }
  test -x ~/venv/bin/jaxrlhf || { python3 -m venv ~/venv && ~/venv/bin/pip install '$SHARED/jaxrlhf[tpu]'; }"

on_all_hosts "~/venv/bin/jaxrlhf ppo \
  --actor_model_name_or_path $SHARED/runs/sft \
  --critic_model_name_or_path $SHARED/runs/reward \
  --data_path Dahoas/rm-static --data_split 2,4,4 \
  --output_dir $SHARED/runs/ppo \
  --save_steps 50 \
  --resume"
