#!/usr/bin/env bash
# Stage 1 on a TPU pod slice of Google Cloud: TPU=name ZONE=us-east5-a deploy/tpu/train.sh
# Starts the same command on all hosts of the slice. On one host alone it would wait for the others, say so, and give up
# after distributed.timeout_s.
#
# Before, once: the repository and the package on every host, and one file system that all of them see, for example
#   gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command '
#       git clone https://... minigpt4_jax && pip install -e "minigpt4_jax[train,tpu]" &&
#       sudo mkdir -p /shared && sudo mount -o nfsvers=3 FILESTORE_ADDRESS:/share /shared'
set -euo pipefail
: "${TPU:?name of the TPU}" "${ZONE:?its zone}"
: "${MODEL:=/shared/models/vicuna-7b}" "${DATA:=/shared/data}" "${WORKDIR:=/shared/runs/stage1}"

# MEGASCALE_*: left behind by an earlier job of several slices, they make JAX wait for machines that are gone.
# The number of the host and of all hosts come from the slice's metadata. A host that loses the others begins again
# (deploy/again.sh) and waits for them. One that reboots does not: its again.sh went with the ssh session. Then end what is
# left on all hosts and run this script again; the run goes on at its last checkpoint:
#   gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all \
#       --command 'pkill -f deploy/[a]gain.sh; pkill -f [t]rain.py'
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "
    cd minigpt4_jax &&
    unset MEGASCALE_COORDINATOR_ADDRESS MEGASCALE_NUM_SLICES MEGASCALE_SLICE_ID &&
    deploy/again.sh python train.py --config configs/train/minigpt4_stage1.yaml \
        model='$MODEL' data.sources.laion.path='$DATA/laion' data.sources.cc_sbu.path='$DATA/cc_sbu' \
        workdir='$WORKDIR' data.num_threads=64 distributed.timeout_s=600"
