# llama.cpp's server, set by environment, from the root of the repository:
#   docker build -f infra/images/llama.Dockerfile -t rewatch/llama .
#   docker build -f infra/images/llama.Dockerfile -t rewatch/llama-cuda \
#       --build-arg LLAMA_IMAGE=ghcr.io/ggml-org/llama.cpp:server-cuda-b11382 .
ARG LLAMA_IMAGE=ghcr.io/ggml-org/llama.cpp:server-b11382
FROM ${LLAMA_IMAGE}
COPY --chmod=0555 infra/images/serve-llm.sh /usr/local/bin/serve-llm
COPY infra/models/weights/analyst.gguf /opt/rewatch/analyst.gguf
# MODEL_PATH: a GGUF file, or `demo` for the toy that comes with the product. PARALLEL slots share CTX_SIZE tokens.
# GPU_LAYERS: how many layers lie on a GPU; auto is as many as fit, all is all.
ENV MODEL_PATH=demo PORT=8091 GPU_LAYERS=auto CTX_SIZE=4096 PARALLEL=2 HOME=/tmp
WORKDIR /tmp
USER 65532:65532
EXPOSE 8091
ENTRYPOINT ["/usr/local/bin/serve-llm"]
# 503 while the model loads: 30 GB from a slow disk take minutes, and then `starting` is right for two of them.
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["/bin/sh", "-c", "curl -fsS -o /dev/null http://127.0.0.1:${PORT}/health"]
