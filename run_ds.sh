#!/usr/bin/env bash
# The ZeRO-3 offload experiment under DeepSpeed's launcher. Edit the values, or set variables; arguments are passed on.
# A variable that looks like one of these and is none is refused:
#
#   bash run_ds.sh                                             # the original's settings
#   bash run_ds.sh --preset fast                               # ours, for speed
#   MAX_SEQ_LENGTH=131072 bash run_ds.sh --preset longest      # a sequence as long as host memory allows
#   PER_DEVICE_TRAIN_BATCH_SIZE=32 ENABLE_FLCE=0 bash run_ds.sh
#   NUM_GPUS=2 bash run_ds.sh
#   NUM_GPUS=64 bash run_ds.sh --dry_run                       # predicts GPU and host memory; needs no GPU
#   bash run_ds.sh --find_min num_gpus --gpu_memory_gib 24     # predicts how many such GPUs a model needs
#
# Several machines, a line each in the file: name slots=8. Through ssh without a password and pdsh:
#   HOSTFILE=hosts bash run_ds.sh
# Without either, on each machine, NODE_RANK counting up from 0 in the order of the lines:
#   HOSTFILE=hosts NODE_RANK=0 MASTER_ADDR=<address of the first> bash run_ds.sh
set -euo pipefail

NUM_GPUS=${NUM_GPUS:-} # empty: 1, or with a HOSTFILE as many as each machine has slots
HOSTFILE=${HOSTFILE:-}
NODE_RANK=${NODE_RANK:-}
MASTER_ADDR=${MASTER_ADDR:-}
MASTER_PORT=${MASTER_PORT:-} # empty: one that is free, or with a HOSTFILE DeepSpeed's 29500

refuse() { echo "error: $*" >&2; exit 2; }
is_count() { [[ "$1" =~ ^[1-9][0-9]{0,5}$ ]]; }
# A name that begins with "-" would reach ssh as an option, which can run a program; pdsh expands brackets and commas.
is_host() { [[ "$1" =~ ^([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_:][A-Za-z0-9_.:-]*$ ]]; }

[ -z "$HOSTFILE" ] || HOSTFILE=$(realpath -m -- "$HOSTFILE") # as seen from where the script was started
cd "$(dirname "${BASH_SOURCE[0]}")"
python -m src.offload.variables run_ds.sh || exit
[ -z "$MASTER_PORT" ] || { is_count "$MASTER_PORT" && [ "$MASTER_PORT" -lt 65536 ]; } ||
    refuse "MASTER_PORT must be a port's number, got '$MASTER_PORT'"
[ -z "$MASTER_ADDR" ] || is_host "$MASTER_ADDR" || refuse "MASTER_ADDR must be a machine's name, got '$MASTER_ADDR'"
[[ "${DS_ACCELERATOR:-cpu}" =~ ^(cpu|cuda)$ ]] || refuse "DS_ACCELERATOR must be cpu, cuda or unset, got '$DS_ACCELERATOR'"
[ -z "$NUM_GPUS" ] || is_count "$NUM_GPUS" || refuse "NUM_GPUS must be a number of GPUs, got '$NUM_GPUS'"
[ -n "$HOSTFILE" ] || [ -z "$NODE_RANK" ] || refuse "NODE_RANK counts the lines of a HOSTFILE: set that, too"
[ -n "$HOSTFILE$NUM_GPUS" ] || NUM_GPUS=1

plans= # what only predicts needs no launcher: one process simulates one of NUM_GPUS ranks
for word in "$@"; do
    case "$word" in --help | -h) exec python deepspeed_liger_kernel.py --help ;; esac
    [[ ! "$word" =~ ^--(dry_run|find_max|find_min)(=|$) || "$word" == --dry_run=0 ]] || plans=1
done
[ -z "$plans" ] || [ -z "$HOSTFILE" ] || refuse "a dry run takes no HOSTFILE: NUM_GPUS are the GPUs of all machines"

# DeepSpeed would run on this machine alone if the file were missing, and take GPUs that a machine has no slots for.
launcher=(--no_local_rank --log_level critical ${MASTER_PORT:+--master_port "$MASTER_PORT"})
launcher+=(${NUM_GPUS:+--num_gpus "$NUM_GPUS"})
if [ -n "$HOSTFILE" ]; then
    [ -f "$HOSTFILE" ] && [ -r "$HOSTFILE" ] || refuse "HOSTFILE: $HOSTFILE is no file that can be read"
    hosts=() # names, in order
    while IFS=$' \t\r' read -r name slots more || [ -n "$name" ]; do
        if [[ -z "$name" || "$name" == "#"* ]]; then continue; fi
        is_count "${slots#slots=}" && [[ "$slots" == slots=* && "$more" =~ ^(#.*)?$ ]] ||
            refuse "HOSTFILE: a line must be like 'name slots=8', not '$name${slots:+ $slots}${more:+ $more}'"
        is_host "$name" || refuse "HOSTFILE: '$name' is no name of a machine"
        [[ " ${hosts[*]-} " != *" $name "* ]] || refuse "HOSTFILE: $name is there twice"
        [ "${NUM_GPUS:-0}" -le "${slots#slots=}" ] || refuse "NUM_GPUS=$NUM_GPUS, but HOSTFILE: $name $slots"
        hosts+=("$name")
    done <"$HOSTFILE"
    [ ${#hosts[@]} -gt 0 ] || refuse "HOSTFILE: $HOSTFILE names no machine; a line each: name slots=8"
    launcher+=(--hostfile "$HOSTFILE" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"})
    if [ -n "$NODE_RANK" ]; then
        [[ "$NODE_RANK" =~ ^[0-9]{1,5}$ ]] && [ "$NODE_RANK" -lt ${#hosts[@]} ] ||
            refuse "NODE_RANK must be from 0 to $((${#hosts[@]} - 1)) with this HOSTFILE, got '$NODE_RANK'"
        [ -n "$MASTER_ADDR" ] || refuse "NODE_RANK needs MASTER_ADDR, the address of the first machine"
        launcher+=(--no_ssh --node_rank "$NODE_RANK")
    else
        instead="; or start each machine's part yourself, with NODE_RANK and MASTER_ADDR"
        command -v pdsh >/dev/null || refuse "HOSTFILE needs pdsh, which is not installed$instead"
        for name in "${hosts[@]}"; do
            ssh -n -o BatchMode=yes -o ConnectTimeout=10 -- "$name" true 2>/dev/null ||
                refuse "HOSTFILE: no ssh to $name without a password$instead"
        done
        launcher+=(--no_ssh_check)
    fi
fi

if [ -n "$plans" ] || python -c "import sys; from src import machine; sys.exit(not machine.has_gpu())"; then
    device=cuda model=meta-llama/Llama-3.2-1B-Instruct length=1024 iterations=5
else # a size for Triton's interpreter
    export DS_ACCELERATOR=cpu TRITON_INTERPRET=1
    device=cpu model=tiny-llama length=32 iterations=2
fi

MODEL_NAME=${MODEL_NAME:-$model}
PRESET=${PRESET:-} # empty: the script's

FP16_LOSS_SCALE_WINDOW=${FP16_LOSS_SCALE_WINDOW:-100}
FP16_INITIAL_SCALE_POWER=${FP16_INITIAL_SCALE_POWER:-7}
FP16_HYSTERESIS=${FP16_HYSTERESIS:-1}

REDUCE_BUCKET_SIZE=${REDUCE_BUCKET_SIZE:-} # empty: the preset's; 1e5 in the original
SUB_GROUP_SIZE=${SUB_GROUP_SIZE:-}         # empty: the preset's; 0 in the original
GRADIENT_CLIPPING=${GRADIENT_CLIPPING:-0.9}

PER_DEVICE_TRAIN_BATCH_SIZE=${PER_DEVICE_TRAIN_BATCH_SIZE:-} # empty: the preset's; 4 in the original
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
ENABLE_FLCE=${ENABLE_FLCE:-${ENABLE_LIGER_FLCE:-1}} # the original's name, and one like its siblings'
ENABLE_LIGER_FLCE=${ENABLE_LIGER_FLCE:-$ENABLE_FLCE}
[ "$ENABLE_FLCE" = "$ENABLE_LIGER_FLCE" ] ||
    refuse "ENABLE_FLCE=$ENABLE_FLCE, but ENABLE_LIGER_FLCE=$ENABLE_LIGER_FLCE: set one of them"

arguments=(
    --model_name "$MODEL_NAME"
    ${PRESET:+--preset "$PRESET"}
    --fp16_loss_scale_window "$FP16_LOSS_SCALE_WINDOW"
    --fp16_initial_scale_power "$FP16_INITIAL_SCALE_POWER"
    --fp16_hysteresis "$FP16_HYSTERESIS"
    ${REDUCE_BUCKET_SIZE:+--reduce_bucket_size "$REDUCE_BUCKET_SIZE"}
    ${SUB_GROUP_SIZE:+--sub_group_size "$SUB_GROUP_SIZE"}
    --gradient_clipping "$GRADIENT_CLIPPING"
    ${PER_DEVICE_TRAIN_BATCH_SIZE:+--per_device_train_batch_size "$PER_DEVICE_TRAIN_BATCH_SIZE"}
    --num_train_iterations "$NUM_TRAIN_ITERATIONS"
    --gradient_accumulation_steps "$GRADIENT_ACCUMULATION_STEPS"
    --max_seq_len "$MAX_SEQ_LENGTH"
    --learning_rate "$LEARNING_RATE"
    --weight_decay "$WEIGHT_DECAY"
    --beta_0 "$BETA_0"
    --beta_1 "$BETA_1"
    --step_per_print "$STEP_PER_PRINT"
    --seed "$SEED"
    --enable_liger_rope "$ENABLE_LIGER_ROPE"
    --enable_liger_swiglu "$ENABLE_LIGER_SWIGLU"
    --enable_liger_rms "$ENABLE_LIGER_RMS"
    --enable_liger_flce "$ENABLE_FLCE"
    "$@"
)
if [ -n "$plans" ]; then
    exec python deepspeed_liger_kernel.py --num_gpus "$NUM_GPUS" "${arguments[@]}"
fi
arguments=(--device "$device" "${arguments[@]}")
python -m src.cli "${arguments[@]}" || exit # bad ones are told now, not after DeepSpeed's launcher has started
exec python -m src.offload.launch "${launcher[@]}" --module src.offload.rank deepspeed_liger_kernel.py "${arguments[@]}"
