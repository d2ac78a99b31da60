#!/bin/bash
# Runs the same command on every host of a TPU slice. The processes find each other through the slice's metadata.
#   TPU=my-v5p-64 ZONE=us-east5-a scripts/launch/tpu-pod.sh
# Set: TPU and ZONE of an existing slice, SHARED, and the command at the end. To create a slice:
#   gcloud compute tpus tpu-vm create "$TPU" --zone "$ZONE" --accelerator-type v5p-64 --version v2-alpha-tpuv5
set -euo pipefail
: "${TPU:?name of the TPU slice}" "${ZONE:?its zone}"

# A folder for models, data and checkpoints, mounted on every host, such as Filestore over NFS. --output_dir cannot be a
# bucket mounted with gcsfuse, because a checkpoint is written and then renamed.
SHARED=${SHARED:-/mnt/shared}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$1"
}

on_all_hosts "test -d $SHARED || { echo '$SHARED is not mounted' >&2; exit 1; }
  test -x ~/venv/bin/jaxrlhf || { python3 -m venv ~/venv && ~/venv/bin/pip install '$SHARED/jaxrlhf[tpu]'; }"

on_all_hosts "venv/bin/jaxrlhf ppo \
  --actor_model_name_or_path $SHARED/runs/sft \
  --critic_model_name_or_path $SHARED/runs/reward \
  --data_path Dahoas/rm-static --data_split 2,4,4 \
  --output_dir $SHARED/runs/ppo \
  --save_steps 50 \
  --resume"
