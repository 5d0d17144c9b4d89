#!/usr/bin/env bash
# A PostgreSQL server of its own for tests and benchmarks, on loopback and under one folder:
#
#   scripts/postgresql.sh start FOLDER     installs Debian's package if need be, starts a server,
#                                          prints its address
#   scripts/postgresql.sh stop FOLDER      stops it; its data stay
#
# PostgreSQL refuses to run as root: root starts it as the user `postgres` of Debian's package.
# Durability is as in production (fsync on), for that is what the tests are about.
set -euo pipefail

folder=${2:?usage: postgresql.sh start|stop FOLDER}

as_owner() {
  if [ "$(id -u)" = 0 ]; then
    (cd / && setpriv --reuid postgres --regid postgres --init-groups --no-new-privs -- "$@")
  else
    "$@"
  fi
}

tools() {
  find /usr/lib/postgresql -mindepth 3 -maxdepth 3 -path '*/bin/pg_ctl' 2>/dev/null \
    | sort -V | tail -n 1 | xargs -r dirname
}

# The port of SERVER_PORT, or a free one.
port() {
  if [ -n "${SERVER_PORT:-}" ]; then echo "$SERVER_PORT"; return; fi
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

start() {
  if [ -z "$(tools)" ]; then
    echo "installing Debian's PostgreSQL" >&2
    export DEBIAN_FRONTEND=noninteractive
    mkdir -p /etc/postgresql-common
    # No cluster of the system's own: this script makes the one it needs.
    grep -qs '^create_main_cluster' /etc/postgresql-common/createcluster.conf \
      || echo 'create_main_cluster = false' >> /etc/postgresql-common/createcluster.conf
    { apt-get -qq install -y --no-install-recommends postgresql \
      || { apt-get -qq update && apt-get -qq install -y --no-install-recommends postgresql; }; } >&2
  fi
  bin=$(tools)
  mkdir -p "$folder"
  folder=$(cd "$folder" && pwd)
  password=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
  if [ "$(id -u)" = 0 ]; then chown postgres "$folder"; fi
  chmod 700 "$folder"
  if [ ! -s "$folder/data/PG_VERSION" ]; then
    (umask 077 && printf '%s' "$password" > "$folder/password")
    if [ "$(id -u)" = 0 ]; then chown postgres "$folder/password"; fi
    as_owner "$bin/initdb" -D "$folder/data" -U fortpoint --pwfile "$folder/password" \
      -A scram-sha-256 -E UTF8 --locale C >"$folder/initdb.log"
  fi
  password=$(cat "$folder/password")
  port=$(port)
  as_owner "$bin/pg_ctl" -D "$folder/data" -l "$folder/server.log" -w -t 60 -s \
    -o "-c listen_addresses=127.0.0.1 -c port=$port -c unix_socket_directories='' -c fsync=on" \
    start >&2 || { tail -n 20 "$folder/server.log" >&2; exit 1; }
  printf 'postgresql://fortpoint:%s@127.0.0.1:%s/postgres\n' "$password" "$port"
}

# Not by pg_ctl: it waits for a process that is dead, where nobody reaps it, until its time is over.
stop() {
  pid=$(head -n 1 "$folder/data/postmaster.pid")
  kill -INT "$pid"
  for _ in $(seq 300); do
    case $(sed -n 's/^State:[[:space:]]*//p' "/proc/$pid/status" 2>/dev/null) in
      '' | Z*) return ;;
    esac
    sleep 0.1
  done
  kill -QUIT "$pid"
}

case "${1:-}" in
  start | stop) "$1" ;;
  *) echo "usage: postgresql.sh start|stop FOLDER" >&2; exit 2 ;;
esac
