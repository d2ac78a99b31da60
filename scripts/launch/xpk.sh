#!/bin/bash
# Runs PPO on a TPU slice of a cluster that xpk made.
#   CLUSTER=my-cluster PROJECT=my-project ZONE=us-east5-b IMAGE=REGION-docker.pkg.dev/… scripts/launch/xpk.sh
# Set: the four variables, tpu-type, and the command. IMAGE is built from scripts/docker/tpu.Dockerfile. Storage that all
# hosts write, such as Filestore, is mounted at /shared: xpk storage attach NAME --mount-point /shared --auto-mount true …
set -euo pipefail
: "${CLUSTER:?name of the cluster}" "${PROJECT:?its project}" "${ZONE:?its zone}" "${IMAGE:?container image}"

# xpk restarts a workload after the statuses 127 to 255, so after 130 (SIGTERM: a checkpoint is saved) and 137 (killed).
# 75 says that another process was lost. The grace period is the time to save a checkpoint.
xpk workload create \
  --cluster "$CLUSTER" --project "$PROJECT" --zone "$ZONE" \
  --workload "${WORKLOAD:-jaxrlhf-ppo}" \
  --tpu-type v6e-16 --num-slices 1 \
  --docker-image "$IMAGE" \
  --max-restarts 40 --restart-on-exit-codes 75 \
  --termination-grace-period-seconds 180 \
  --command "jaxrlhf ppo \
    --actor_model_name_or_path /shared/runs/sft \
    --critic_model_name_or_path /shared/runs/reward \
    --data_path Dahoas/rm-static --data_split 2,4,4 \
    --data_cache_dir /shared/cache \
    --output_dir /shared/runs/ppo \
    --save_steps 50 \
    --resume"
