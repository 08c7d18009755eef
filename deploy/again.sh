#!/usr/bin/env bash
# Runs a command again until it is done or cannot go on: deploy/again.sh python train.py --config ... workdir=...
# For hosts without a scheduler that would. Each host of a run does it by itself: the processes wait for each other.
set -uo pipefail
for attempt in $(seq 1 "${ATTEMPTS:-10}"); do
    "$@"
    code=$?
    case $code in
        0 | 1 | 2 | 130) exit $code ;; # done; a mistake of ours; one of the settings; Ctrl-C
    esac
    echo "Attempt $attempt ended with $code: again, from the last checkpoint." >&2
    sleep 5
done
exit $code
