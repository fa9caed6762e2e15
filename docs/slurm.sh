#!/bin/bash
#SBATCH --job-name=gpt-tf
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
##SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

# A GPT trained by one worker per node: sbatch slurm.sh
#
# When a worker is lost the others end within half a minute; all start again and go on
# from the newest checkpoint; when a node is lost Slurm requeues the job, which does
# the same. OUT and CORPUS lie on a file system that all nodes share.

: "${OUT:=$HOME/runs/gpt}" "${CORPUS:=python-stdlib}" "${ATTEMPTS:=20}"
export OUT CORPUS

WORKER_PORT=$((20000 + SLURM_JOB_ID % 10000))
WORKER_ADDRESSES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" |
  sed "s/.*/\"&:$WORKER_PORT\"/" | paste -s -d , -)
export WORKER_ADDRESSES

worker='
task="{\"type\": \"worker\", \"index\": $SLURM_PROCID}"
export TF_CONFIG="{\"cluster\": {\"worker\": [$WORKER_ADDRESSES]}, \"task\": $task}"
exec gpt-tf train --preset small --corpus "$CORPUS" --out "$OUT" \
  --strategy multi_worker --resume-or-start
'

for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
  srun --kill-on-bad-exit=0 --wait=120 bash -c "$worker"
  status=$?
  # 2 is wrong input, which a new start does not mend.
  if [[ $status -eq 0 || $status -eq 2 ]]; then
    exit "$status"
  fi
  echo "attempt $attempt of $ATTEMPTS ended with status $status"
done
exit "$status"
