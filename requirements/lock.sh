#!/usr/bin/env bash
# Resolve requirements/*.in into *.lock with hashes. Usage: requirements/lock.sh UV [--find-links FOLDER | --torch-backend cpu]
set -euo pipefail
cd "$(dirname "$0")"
uv=$1; shift
compile() { "$uv" pip compile --quiet --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_31 --no-header "$@"; }
for name in uv main; do compile "$@" "$name.in" -o "$name.lock"; done
for name in data serve; do compile "$@" --no-deps "$name.in" -o "$name.lock"; done
# Without dependencies uv reads no metadata of a local version, and so writes no hash for torch: it is main.lock's.
hash=$(grep -A1 '^torch==' main.lock | grep -o 'sha256:[0-9a-f]*')
sed -i "s|^\(torch==[^ ]*\)\$|\1 \\\\\n    --hash=$hash|" serve.lock
