# What the stand-ins of servers run on: the test's base with the folders that the servers' own images bring.
ARG BASE
FROM ${BASE}
COPY --chmod=0555 rpk /usr/local/bin/rpk
RUN install -d -o 101 -g 101 /var/lib/redpanda/data /var/lib/clickhouse && \
    install -d -o 65532 -g 65532 /data /models
WORKDIR /tmp
