#!/bin/sh
# Usage: train | eval | predict, then the entry point's options. `train` starts one rank per visible GPU (two on a CPU).
set -eu
command=${1:-train}
[ $# -gt 0 ] && shift
case $command in
train)
    ranks=${RANKS:-$(python -c 'import torch; print(torch.cuda.device_count() or 2)')}
    # --local-addr: without it, torchrun waits without a word where the container's name cannot be resolved
    exec torchrun --standalone --local-addr localhost --nproc-per-node "$ranks" trainer/train.py "$@"
    ;;
eval | predict)
    exec python "trainer/$command.py" "$@"
    ;;
*)
    echo "error: unknown command '$command', legal: train, eval, predict" >&2
    exit 2
    ;;
esac
