#!/bin/sh
# The same image, configuration and seed give the same metrics and the same weights, byte by byte: runs a command of
# lit-align twice, each time from nothing, and compares what was left.
#   docker run --rm --entrypoint sh -v "$PWD/docker:/docker:ro" lit-align /docker/twice.sh demo --quick
set -eu
[ $# -gt 0 ] || set -- demo --quick
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
for run in first second; do
  LIT_ALIGN_CACHE="$place/cache-$run" lit-align "$@" --out "$place/$run"
done
cd "$place/first"
files=$(find . -type f \( -name metrics.csv -o -name '*.jsonl' -o -name '*.safetensors' \) | sort)
[ -n "$files" ] || { echo "nothing to compare: no metrics.csv" >&2; exit 1; }
for file in $files; do
  cmp "$file" "../second/$file"
  sha256sum "$file"
done
echo "$(echo "$files" | wc -l) files, identical in both runs"
