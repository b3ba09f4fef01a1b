#!/usr/bin/env bash
# The ZeRO-3 offload experiment under DeepSpeed's launcher. Edit the values, or set variables; arguments are passed on:
#
#   bash run_ds.sh                                             # the original's settings
#   bash run_ds.sh --preset fast                               # ours, for speed
#   PER_DEVICE_TRAIN_BATCH_SIZE=32 ENABLE_FLCE=0 bash run_ds.sh
#   NUM_GPUS=2 bash run_ds.sh
#   HOSTFILE=hosts NUM_GPUS=8 bash run_ds.sh                   # several machines; a line each: name slots=8
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    device=cuda model=meta-llama/Llama-3.2-1B-Instruct batch=4 length=1024 iterations=5
else # a size for Triton's interpreter
    export DS_ACCELERATOR=cpu
    device=cpu model=tiny-llama batch=2 length=64 iterations=2
fi

NUM_GPUS=${NUM_GPUS:-1}
HOSTFILE=${HOSTFILE:-}
MASTER_PORT=${MASTER_PORT:-29500}

MODEL_NAME=${MODEL_NAME:-$model}

FP16_LOSS_SCALE_WINDOW=${FP16_LOSS_SCALE_WINDOW:-100}
FP16_INITIAL_SCALE_POWER=${FP16_INITIAL_SCALE_POWER:-7}
FP16_HYSTERESIS=${FP16_HYSTERESIS:-1}

REDUCE_BUCKET_SIZE=${REDUCE_BUCKET_SIZE:-} # empty: the preset's; 1e5 in the original
SUB_GROUP_SIZE=${SUB_GROUP_SIZE:-}         # empty: the preset's; 0 in the original
GRADIENT_CLIPPING=${GRADIENT_CLIPPING:-0.9}

PER_DEVICE_TRAIN_BATCH_SIZE=${PER_DEVICE_TRAIN_BATCH_SIZE:-$batch}
NUM_TRAIN_ITERATIONS=${NUM_TRAIN_ITERATIONS:-$iterations}
GRADIENT_ACCUMULATION_STEPS=${GRADIENT_ACCUMULATION_STEPS:-1}
MAX_SEQ_LENGTH=${MAX_SEQ_LENGTH:-$length}

LEARNING_RATE=${LEARNING_RATE:-1e-4}
WEIGHT_DECAY=${WEIGHT_DECAY:-0.01}
BETA_0=${BETA_0:-0.9}
BETA_1=${BETA_1:-0.95}

STEP_PER_PRINT=${STEP_PER_PRINT:-10}
SEED=${SEED:-42}

ENABLE_LIGER_ROPE=${ENABLE_LIGER_ROPE:-1}
ENABLE_LIGER_SWIGLU=${ENABLE_LIGER_SWIGLU:-1}
ENABLE_LIGER_RMS=${ENABLE_LIGER_RMS:-1}
ENABLE_FLCE=${ENABLE_FLCE:-1}

launcher=(--num_gpus "$NUM_GPUS" --master_port "$MASTER_PORT" --no_local_rank --log_level error)
if [ -n "$HOSTFILE" ]; then launcher+=(--hostfile "$HOSTFILE"); fi

exec deepspeed "${launcher[@]}" deepspeed_liger_kernel.py --device "$device" \
    --model_name "$MODEL_NAME" \
    --fp16_loss_scale_window "$FP16_LOSS_SCALE_WINDOW" \
    --fp16_initial_scale_power "$FP16_INITIAL_SCALE_POWER" \
    --fp16_hysteresis "$FP16_HYSTERESIS" \
    ${REDUCE_BUCKET_SIZE:+--reduce_bucket_size "$REDUCE_BUCKET_SIZE"} \
    ${SUB_GROUP_SIZE:+--sub_group_size "$SUB_GROUP_SIZE"} \
    --gradient_clipping "$GRADIENT_CLIPPING" \
    --per_device_train_batch_size "$PER_DEVICE_TRAIN_BATCH_SIZE" \
    --num_train_iterations "$NUM_TRAIN_ITERATIONS" \
    --gradient_accumulation_steps "$GRADIENT_ACCUMULATION_STEPS" \
    --max_seq_len "$MAX_SEQ_LENGTH" \
    --learning_rate "$LEARNING_RATE" \
    --weight_decay "$WEIGHT_DECAY" \
    --beta_0 "$BETA_0" \
    --beta_1 "$BETA_1" \
    --step_per_print "$STEP_PER_PRINT" \
    --seed "$SEED" \
    --enable_liger_rope "$ENABLE_LIGER_ROPE" \
    --enable_liger_swiglu "$ENABLE_LIGER_SWIGLU" \
    --enable_liger_rms "$ENABLE_LIGER_RMS" \
    --enable_liger_flce "$ENABLE_FLCE" \
    "$@"
