#!/bin/sh
# A trial in a POSIX shell: gradient descent on f(x) = x^2 / 2 from a start between 1 and 2 that the seed decides.
# sh descent.sh LR STEPS; the rest comes in ORCHESTRATE_* (docs/programs.md). The sweep is sweeps/programs/descent.yaml.
set -eu
lr=$1 steps=$2
checkpoint=$ORCHESTRATE_DIRECTORY/checkpoints/state

report() {  # STEP NAME VALUE
    printf '{"step": %s, "metrics": {"%s": %s}}\n' "$1" "$2" "$3" >> "$ORCHESTRATE_REPORT"
}

save() {
    printf '%s %s\n' "$step" "$x" > "$checkpoint.partial"
    mv "$checkpoint.partial" "$checkpoint"
}

step=0
x=$(awk -v seed="$ORCHESTRATE_SEED" 'BEGIN { srand(seed + 1); printf "%.9f", 1 + rand() }')
for folder in $(printf '%s' "$ORCHESTRATE_RESUME_FROM" | tr ':' '\n'); do  # the newest comes last
    if [ -f "$folder/state" ]; then read -r step x < "$folder/state"; fi
done
echo "begins at step $step with x = $x"

while [ "$step" -lt "$steps" ]; do
    if [ -e "$ORCHESTRATE_STOP" ]; then
        save
        exit 0
    fi
    x=$(awk -v x="$x" -v lr="$lr" 'BEGIN { printf "%.9f", x - lr * x }')
    step=$((step + 1))
    report "$step" train/loss "$(awk -v x="$x" 'BEGIN { printf "%.9f", x * x / 2 }')"
    save
    sleep "${DESCENT_PAUSE:-0}"
done
report "$step" test/objective "$(awk -v x="$x" 'BEGIN { printf "%.9f", x * x / 2 }')"
