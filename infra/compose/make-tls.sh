#!/bin/sh
# Makes what secure.yaml lacks in the folder of the secrets (secrets/, or SECRETS of the environment): an authority of
# this installation's own, and a certificate with its key for each server. What is there stays. openssl is all that it
# needs: no image has to be there yet.
#
#   ./make-tls.sh                                        one machine: servers are asked for by their services' names
#   ./make-tls.sh redpanda=log.lan clickhouse=store.lan  several: and by names or addresses that others use
#
# To renew one, or to add a name, delete its file (tls_gateway) and run this again. The authority's key
# (tls_authority_key) signs, and nothing else needs it: keep it elsewhere once all are made.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=${SECRETS:-$here/secrets}
servers="redpanda clickhouse detector llm gateway"
# Apple's clients refuse a server certificate that is good for longer than 825 days.
authority_days=3650 server_days=825

command -v openssl >/dev/null || { echo "there is no openssl: install it (apt-get install openssl)" >&2; exit 1; }
for pair in "$@"; do
    case " $servers " in
    *" ${pair%%=*} "*) ;;
    *) echo "$pair: not SERVER=NAME; the servers are $servers" >&2 && exit 2 ;;
    esac
done
mkdir -p "$folder"
chmod 0700 "$folder"
work=$(mktemp -d "$folder/.new.XXXXXX")
trap 'rm -rf "$work"' EXIT

# `new_key FILE`: whoever is given it reads it, as every secret here; the folder is its owner's alone.
new_key() { openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>"$work/said" || { cat "$work/said" >&2; exit 1; }; }

if [ ! -s "$folder/tls_ca" ]; then
    new_key "$work/ca_key"
    openssl req -x509 -new -sha256 -key "$work/ca_key" -days "$authority_days" -subj "/CN=rewatch authority" \
        -addext "basicConstraints=critical,CA:TRUE,pathlen:0" -addext "keyUsage=critical,keyCertSign,cRLSign" \
        -out "$work/ca"
    chmod 0400 "$work/ca_key"
    chmod 0444 "$work/ca"
    mv -f "$work/ca_key" "$folder/tls_authority_key"
    mv -f "$work/ca" "$folder/tls_ca"
    echo "made $folder/tls_ca"
fi

for server in $servers; do
    names="DNS:$server,DNS:localhost,IP:127.0.0.1"
    for pair in "$@"; do
        [ "${pair%%=*}" = "$server" ] || continue
        name=${pair#*=}
        case $name in
        *:*) kind=IP ;;
        *[!0-9.]*) kind=DNS ;;
        *) kind=IP ;;
        esac
        names="$names,$kind:$name"
        [ -s "$folder/tls_$server" ] || continue
        case $kind in IP) check=-checkip ;; *) check=-checkhost ;; esac
        if openssl x509 -in "$folder/tls_$server" -noout "$check" "$name" | grep -q "NOT match"; then
            echo "$folder/tls_$server is there, and is not for $name: delete it, and run this again" >&2
            exit 1
        fi
    done
    [ ! -s "$folder/tls_$server" ] || continue
    if [ ! -s "$folder/tls_authority_key" ]; then
        echo "$folder/tls_authority_key is not here: put it back to make $folder/tls_$server" >&2
        exit 1
    fi
    new_key "$work/key"
    {
        echo "basicConstraints=critical,CA:FALSE"
        echo "keyUsage=critical,digitalSignature"
        echo "extendedKeyUsage=serverAuth"
        echo "subjectAltName=$names"
    } >"$work/extensions"
    openssl req -new -sha256 -key "$work/key" -subj "/CN=$server" -out "$work/request"
    openssl x509 -req -sha256 -in "$work/request" -CA "$folder/tls_ca" -CAkey "$folder/tls_authority_key" \
        -CAcreateserial -CAserial "$work/serial" -days "$server_days" -extfile "$work/extensions" \
        -out "$work/certificate" 2>"$work/said" || { cat "$work/said" >&2; exit 1; }
    chmod 0444 "$work/key" "$work/certificate"
    mv -f "$work/key" "$folder/tls_${server}_key"
    mv -f "$work/certificate" "$folder/tls_$server"
    echo "made $folder/tls_$server"
done
