#!/bin/sh
# llama.cpp's server by the environment: MODEL_PATH, PORT, GPU_LAYERS, CTX_SIZE, PARALLEL, and LLAMA_API_KEY_FILE for a
# key that clients must send. More arguments are handed on.
set -eu

if [ "$MODEL_PATH" = demo ]; then
    MODEL_PATH=/opt/rewatch/analyst.gguf
fi
if [ ! -r "$MODEL_PATH" ]; then
    echo "no model at $MODEL_PATH: set MODEL_PATH to a GGUF file in the volume of the models" >&2
    exit 1
fi
if [ -n "${LLAMA_API_KEY_FILE:-}" ]; then
    LLAMA_API_KEY=$(cat "$LLAMA_API_KEY_FILE")
    export LLAMA_API_KEY
fi
# The server reads names of its own (LLAMA_ARG_PORT), not these.
exec "${LLAMA_SERVER_PATH:-/app/llama-server}" --model "$MODEL_PATH" --host 0.0.0.0 --port "$PORT" \
    --n-gpu-layers "$GPU_LAYERS" --ctx-size "$CTX_SIZE" --parallel "$PARALLEL" --metrics --jinja "$@"
