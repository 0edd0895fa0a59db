#!/bin/sh
# Makes what is missing in the folder of the secrets (secrets/, or the one named): random keys, a file each, and
# ClickHouse's users with the digests of their passwords. What is there stays. To change one, delete its file, run this
# again, and `docker compose up -d --force-recreate`.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$here/secrets}
mkdir -p "$folder"
# The folder is its owner's alone. The files can be read by whoever is given one: containers run as other users.
chmod 0700 "$folder"

for name in clickhouse_admin_password clickhouse_writer_password clickhouse_reader_password gateway_api_key \
    ingest_api_key detector_api_key llm_api_key metrics_api_key grafana_admin_password kafka_password; do
    if [ ! -s "$folder/$name" ]; then
        head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$folder/$name"
        echo "made $folder/$name"
    fi
    chmod 0444 "$folder/$name"
done

users=$(cat "$here/clickhouse/users.xml.in")
for name in clickhouse_admin_password clickhouse_writer_password clickhouse_reader_password; do
    digest=$(tr -d '\n' <"$folder/$name" | sha256sum | cut -d' ' -f1)
    users=$(printf '%s\n' "$users" | sed "s/@$name@/$digest/")
done
printf '%s\n' "$users" >"$folder/clickhouse_users.xml.new"
chmod 0444 "$folder/clickhouse_users.xml.new"
mv -f "$folder/clickhouse_users.xml.new" "$folder/clickhouse_users.xml"
